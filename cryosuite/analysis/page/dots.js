// All particles as dots on a canvas below plotly's axes: every particle is drawn, however many, without WebGL.
const GOLDEN = 0.6180339887;

/** A step through 0 .. count - 1 that visits all rows once in a scattered order, so that no cluster hides another. */
function scatteredStep(count) {
  const gcd = (a, b) => (b ? gcd(b, a % b) : a);
  let step = Math.max(1, Math.floor(count * GOLDEN));
  while (gcd(step, count) !== 1) step++;
  return step;
}

/** Weights of a soft disk of a radius in pixels: {reach, weights}. */
function disk(radius) {
  const reach = Math.max(0, Math.ceil(radius - 0.5));
  const width = 2 * reach + 1;
  const weights = new Float32Array(width * width);
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      weights[(y + reach) * width + x + reach] = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(x, y)));
    }
  }
  if (!reach) weights[0] = Math.min(1, Math.max(0.5, radius * 2));
  return { reach, weights, width };
}

/** Dot radius (CSS pixels) and opacity for a number of visible particles: those of the PNG plots. */
function dotSize(count) {
  const area = Math.min(16, Math.max(0.9, 3.2e4 / Math.max(count, 1)));
  return { radius: 1.1 * Math.sqrt(area / Math.PI), opacity: Math.min(0.85, Math.max(0.3, 5e4 / Math.max(count, 1))) };
}

/** Pixel coordinates of all particles in a view {x0, x1, y0, y1, width, height}; -1 outside. Also counts the visible. */
function project(xs, ys, view) {
  const count = xs.length;
  const px = new Int16Array(count);
  const py = new Int16Array(count);
  const kx = view.width / (view.x1 - view.x0);
  const ky = view.height / (view.y1 - view.y0);
  let visible = 0;
  for (let i = 0; i < count; i++) {
    const x = (xs[i] - view.x0) * kx;
    const y = (view.y1 - ys[i]) * ky;
    if (x >= 0 && y >= 0 && x < view.width && y < view.height) {
      px[i] = x;
      py[i] = y;
      visible++;
    } else {
      px[i] = -1;
    }
  }
  return { px, py, visible };
}

/**
 * Draw the dots. shade: index of each particle into colours; faded: 1 where a particle is drawn first and pale.
 */
function drawDots(context, places, view, shade, colours, faded, background, ratio) {
  const { width, height } = view;
  const image = context.createImageData(width, height);
  const pixels = image.data;
  for (let i = 0; i < pixels.length; i += 4) {
    pixels[i] = background[0];
    pixels[i + 1] = background[1];
    pixels[i + 2] = background[2];
    pixels[i + 3] = 255;
  }
  const size = dotSize(places.visible);
  const kernel = disk(size.radius * ratio);
  const dark = background[0] < 128;
  const pale = background.map((value) => value + (dark ? 46 : -38));
  const count = places.px.length;
  const step = scatteredStep(count);
  for (const pass of faded ? [1, 0] : [0]) {
    const opacity = pass ? 0.5 * size.opacity : size.opacity;
    for (let k = 0, i = 0; k < count; k++, i = (i + step) % count) {
      const x = places.px[i];
      if (x < 0 || (faded && faded[i] !== pass)) continue;
      const [r, g, b] = pass ? pale : colours[shade[i]];
      const { reach, weights, width: side } = kernel;
      const y = places.py[i];
      const top = Math.max(-reach, -y);
      const bottom = Math.min(reach, height - 1 - y);
      const left = Math.max(-reach, -x);
      const right = Math.min(reach, width - 1 - x);
      for (let dy = top; dy <= bottom; dy++) {
        let at = 4 * ((y + dy) * width + x + left);
        let w = (dy + reach) * side + left + reach;
        for (let dx = left; dx <= right; dx++, at += 4, w++) {
          const a = opacity * weights[w];
          pixels[at] += (r - pixels[at]) * a;
          pixels[at + 1] += (g - pixels[at + 1]) * a;
          pixels[at + 2] += (b - pixels[at + 2]) * a;
        }
      }
    }
  }
  context.putImageData(image, 0, 0);
}

/** Draw the number of particles per small square, on a logarithmic scale; returns the largest number. */
function drawDensity(context, places, view, colours, background, ratio) {
  const cell = Math.max(2, Math.round(3 * ratio));
  const across = Math.ceil(view.width / cell);
  const down = Math.ceil(view.height / cell);
  const counts = new Uint32Array(across * down);
  let most = 0;
  for (let i = 0; i < places.px.length; i++) {
    if (places.px[i] < 0) continue;
    const at = Math.floor(places.py[i] / cell) * across + Math.floor(places.px[i] / cell);
    counts[at]++;
    if (counts[at] > most) most = counts[at];
  }
  context.fillStyle = `rgb(${background.join()})`;
  context.fillRect(0, 0, view.width, view.height);
  for (let at = 0; at < counts.length; at++) {
    if (!counts[at]) continue;
    const level = Math.round(255 * Math.log1p(counts[at]) / Math.log1p(most));
    context.fillStyle = `rgb(${colours[level].map(Math.round).join()})`;
    context.fillRect((at % across) * cell, Math.floor(at / across) * cell, cell, cell);
  }
  return most;
}

/** Which particle is nearest to a pixel: a grid over the visible ones, made when first asked. */
class Finder {
  constructor(places, view) {
    this.cell = 16;
    this.places = places;
    this.across = Math.ceil(view.width / this.cell) + 1;
    this.down = Math.ceil(view.height / this.cell) + 1;
    const start = new Uint32Array(this.across * this.down + 1);
    const cellOf = (i) => Math.floor(places.py[i] / this.cell) * this.across + Math.floor(places.px[i] / this.cell);
    for (let i = 0; i < places.px.length; i++) if (places.px[i] >= 0) start[cellOf(i) + 1]++;
    for (let c = 0; c < start.length - 1; c++) start[c + 1] += start[c];
    this.rows = new Uint32Array(start[start.length - 1]);
    const next = start.slice();
    for (let i = 0; i < places.px.length; i++) if (places.px[i] >= 0) this.rows[next[cellOf(i)]++] = i;
    this.start = start;
  }

  /** Row of the particle nearest to (x, y) within a distance in device pixels, or -1. */
  nearest(x, y, within) {
    let best = -1;
    let least = within * within;
    const [cx, cy] = [Math.floor(x / this.cell), Math.floor(y / this.cell)];
    const reach = Math.ceil(within / this.cell);
    for (let row = Math.max(0, cy - reach); row <= Math.min(this.down - 1, cy + reach); row++) {
      for (let column = Math.max(0, cx - reach); column <= Math.min(this.across - 1, cx + reach); column++) {
        const cell = row * this.across + column;
        for (let k = this.start[cell]; k < this.start[cell + 1]; k++) {
          const i = this.rows[k];
          const apart = (this.places.px[i] - x) ** 2 + (this.places.py[i] - y) ** 2;
          if (apart < least) [least, best] = [apart, i];
        }
      }
    }
    return best;
  }
}

/** Which particles lie inside a polygon of data coordinates (even-odd rule): Uint8Array. */
function insidePolygon(xs, ys, polygonX, polygonY) {
  const inside = new Uint8Array(xs.length);
  const [low, high] = [Math.min(...polygonY), Math.max(...polygonY)];
  const [left, right] = [Math.min(...polygonX), Math.max(...polygonX)];
  const corners = polygonX.length;
  for (let i = 0; i < xs.length; i++) {
    const [x, y] = [xs[i], ys[i]];
    if (!(x >= left && x <= right && y >= low && y <= high)) continue;
    let odd = false;
    for (let a = 0, b = corners - 1; a < corners; b = a++) {
      if ((polygonY[a] > y) !== (polygonY[b] > y)
        && x < ((polygonX[b] - polygonX[a]) * (y - polygonY[a])) / (polygonY[b] - polygonY[a]) + polygonX[a]) odd = !odd;
    }
    inside[i] = odd ? 1 : 0;
  }
  return inside;
}
