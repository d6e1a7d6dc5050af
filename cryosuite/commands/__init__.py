"""One thin file per subcommand: parse, call one function of the rooms below, print a table."""
