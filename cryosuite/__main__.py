"""``python -m cryosuite`` is the same as ``cryosuite``."""

from cryosuite.cli import main

if __name__ == "__main__":
    main()
