// The viewer of cases: slices, reference and losses, errors by kind, brightness and contrast. No library, no network.
// Its place is <section class="study-viewer">, which report.viewer writes with the cases in a hidden element.
(() => {
"use strict";

const make = (tag, properties = {}, ...children) => {
  const {data, aria, ...rest} = properties, element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(aria || {})) element.setAttribute(name === "role" ? name : `aria-${name}`, value);
  Object.assign(element.dataset, data || {});
  element.append(...children);
  return element;
};
const score = value => value === null || value === undefined ? "–" : value.toFixed(2);
const mean = values => { const known = values.filter(v => v !== null && v !== undefined); return known.length ? known.reduce((a, b) => a + b) / known.length : null; };

// A strip: bytes of all slices one after another, deflated, as base64.
async function unpacked(strip) {
  const bytes = Uint8Array.from(atob(strip), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
// An image's bytes are differences to the byte before: they take less room.
const summed = bytes => { for (let k = 1; k < bytes.length; k++) bytes[k] = bytes[k] + bytes[k - 1] & 255; return bytes; };

async function loaded(item) {
  if (!item.ready) item.ready = Promise.all([unpacked(item.image).then(summed), unpacked(item.reference),
    ...Object.values(item.predictions).map(unpacked)]).then(([image, reference, ...maps]) => {
      item.planes = {image, reference};
      Object.keys(item.predictions).forEach((loss, k) => { item.planes[loss] = maps[k]; });
    });
  await item.ready;
  return item;
}

const scratch = document.createElement("canvas");
function drawImage(context, plane, [wide, high], look) {
  Object.assign(scratch, {width: wide, height: high});
  const pixels = new ImageData(wide, high), grey = new Uint8ClampedArray(256);
  for (let v = 0; v < 256; v++) grey[v] = ((v / 255 - .5) * look.contrast + .5 + look.brightness) * 255;
  for (let k = 0, to = 0; k < plane.length; k++, to += 4) {
    pixels.data[to] = pixels.data[to + 1] = pixels.data[to + 2] = grey[plane[k]];
    pixels.data[to + 3] = 255;
  }
  scratch.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(scratch, 0, 0, context.canvas.width, context.canvas.height);
}
// Each structure's outline, drawn inside its own pixels.
function drawOutlines(context, labels, [wide, high], colors, line) {
  const sx = context.canvas.width / wide, sy = context.canvas.height / high;
  for (let y = 0, k = 0; y < high; y++) for (let x = 0; x < wide; x++, k++) {
    const value = labels[k];
    if (!value) continue;
    context.fillStyle = typeof colors === "string" ? colors : colors[value] || "#fff";
    const left = Math.round(x * sx), top = Math.round(y * sy), right = Math.round((x + 1) * sx), bottom = Math.round((y + 1) * sy);
    if (x === 0 || labels[k - 1] !== value) context.fillRect(left, top, line, bottom - top);
    if (x === wide - 1 || labels[k + 1] !== value) context.fillRect(right - line, top, line, bottom - top);
    if (y === 0 || labels[k - wide] !== value) context.fillRect(left, top, right - left, line);
    if (y === high - 1 || labels[k + wide] !== value) context.fillRect(left, bottom - line, right - left, line);
  }
}
// 0 missed, 1 added, 2 wrong structure, -1 none
const errorAt = (reference, predicted) => reference === predicted ? -1 : !predicted ? 0 : !reference ? 1 : 2;
function drawErrors(context, reference, predicted, [wide, high], colors) {
  const sx = context.canvas.width / wide, sy = context.canvas.height / high;
  context.globalAlpha = .75;
  for (let k = 0; k < reference.length; k++) {
    const color = colors[errorAt(reference[k], predicted[k])];
    if (!color) continue;
    const x = k % wide, y = (k - x) / wide;
    context.fillStyle = color;
    context.fillRect(Math.round(x * sx), Math.round(y * sy), Math.round((x + 1) * sx) - Math.round(x * sx), Math.round((y + 1) * sy) - Math.round(y * sy));
  }
  context.globalAlpha = 1;
}

class Viewer {
  constructor(place, number) {
    this.place = place;
    this.data = JSON.parse(place.querySelector(".data").textContent);
    this.id = `viewer${number}`;
    this.colors = Object.fromEntries(this.data.structures.map(s => [s.value, s.color]));
    this.layers = [{key: "", name: "image alone"}, {key: "reference", name: "reference"}, ...this.data.losses];
    this.state = {layer: this.data.losses[0].key, slice: 0, brightness: 0, contrast: 1, line: true, errors: this.data.errors.map(() => false)};
    this.build();
    this.order();
    this.open(this.sorted[0]);
  }

  // Controls

  build() {
    const {data, id} = this;
    this.cases = make("select", {id: `${id}-case`, onchange: () => this.open(data.cases[this.cases.value])});
    this.orders = make("select", {id: `${id}-order`, onchange: () => { this.order(); this.open(this.sorted[0]); }},
      make("option", {value: ""}, "worst first, mean of the losses"),
      ...data.losses.map(loss => make("option", {value: loss.key}, `worst first, ${loss.name}`)),
      ...(data.losses.length > 1 ? [make("option", {value: "apart"}, "losses differ most first")] : []));
    this.canvas = make("canvas", {aria: {role: "img"}});
    this.corner = make("p", {className: "corner", aria: {hidden: "true"}});
    this.stage = make("div", {className: "stage", tabIndex: 0, aria: {role: "group", label: `Slices of ${data.title}`, describedby: `${id}-keys`}}, this.canvas, this.corner);
    this.slice = make("input", {type: "range", id: `${id}-slice`, min: 0, oninput: () => this.go(+this.slice.value)});
    this.count = make("output", {htmlFor: `${id}-slice`});
    this.radios = this.layers.map((layer, k) => make("input", {type: "radio", name: `${id}-layer`, value: layer.key, onchange: () => this.show(layer.key)}));
    this.thumbs = this.layers.map(() => make("canvas", {aria: {hidden: "true"}}));
    this.scores = this.layers.map(() => make("small"));
    this.line = make("input", {type: "checkbox", checked: true, onchange: () => { this.state.line = this.line.checked; this.draw(); }});
    this.errors = data.errors.map((error, k) => make("input", {type: "checkbox", onchange: () => { this.state.errors[k] = this.errors[k].checked; this.draw(); }}));
    this.areas = data.errors.map(() => make("small"));
    this.flicker = make("button", {type: "button", aria: {pressed: "false"}, onclick: () => this.flick()}, "Flicker with the reference");
    this.brightness = make("input", {type: "range", min: -100, max: 100, value: 0, oninput: () => this.window(this.brightness.value / 100, this.state.contrast)});
    this.contrast = make("input", {type: "range", min: -100, max: 100, value: 0, oninput: () => this.window(this.state.brightness, 2 ** (this.contrast.value / 40))});
    this.status = make("p", {className: "status", aria: {live: "polite", role: "status"}});
    this.table = make("tbody");
    this.lay();
    this.listen();
  }

  lay() {
    const {data, id} = this, field = (name, control, ...rest) => make("label", {className: "field"}, make("span", {}, name), control, ...rest);
    const layers = this.layers.map((layer, k) => make("label", {className: "layer"}, this.radios[k], this.thumbs[k], make("span", {}, layer.name), this.scores[k]));
    const errors = data.errors.map(([name, color], k) => make("label", {className: "check"}, this.errors[k], swatch(color), make("span", {}, name), this.areas[k]));
    const keys = make("p", {className: "keys", id: `${id}-keys`}, "Keys on the picture: arrows or wheel, slice; Page Up and Page Down, case; 1 to 9, loss; R, reference; I, image; "
      + "E, errors; F, flicker; B and V, brightness; C and X, contrast; 0, reset. Drag: across for contrast, up and down for brightness.");
    this.place.append(
      make("div", {className: "bar"}, field("Case", this.cases), field("Order", this.orders)),
      make("div", {className: "parts"},
        make("div", {className: "left"}, this.stage, field("Slice", this.slice, this.count), this.status, this.legend()),
        make("div", {className: "right"},
          make("fieldset", {className: "layers"}, make("legend", {}, "Shown, with the Dice of this slice"), ...layers),
          make("div", {className: "line"}, this.flicker, make("label", {className: "check"}, this.line, make("span", {}, "reference as a white line"))),
          make("fieldset", {className: "errors"}, make("legend", {}, "Errors, in voxels of this slice"), ...errors),
          make("fieldset", {className: "window"}, make("legend", {}, "Window"), field("Brightness", this.brightness), field("Contrast", this.contrast),
            make("button", {type: "button", onclick: () => this.window(0, 1)}, "Reset")))),
      keys, make("p", {className: "keys"}, data.note));
  }

  legend() {
    const head = make("tr", {}, make("th", {scope: "col"}, "Structure"), ...this.data.losses.map(loss => make("th", {scope: "col"}, loss.name)));
    return make("div", {className: "scroll"}, make("table", {className: "dice"}, make("caption", {}, "Dice of the whole case, on its own grid"), make("thead", {}, head), this.table));
  }

  listen() {
    const keys = {ArrowUp: () => this.step(-1), ArrowLeft: () => this.step(-1), ArrowDown: () => this.step(1), ArrowRight: () => this.step(1),
      Home: () => this.go(0), End: () => this.go(this.item.shape[0] - 1), PageUp: () => this.next(-1), PageDown: () => this.next(1),
      r: () => this.turn("reference"), i: () => this.turn(""), f: () => this.flick(), e: () => this.allErrors(), 0: () => this.window(0, 1),
      b: () => this.window(this.state.brightness + .05, this.state.contrast), v: () => this.window(this.state.brightness - .05, this.state.contrast),
      c: () => this.window(this.state.brightness, this.state.contrast * 1.1), x: () => this.window(this.state.brightness, this.state.contrast / 1.1)};
    this.data.losses.slice(0, 9).forEach((loss, k) => { keys[k + 1] = () => this.show(loss.key); });
    this.stage.addEventListener("keydown", event => {
      const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      act();
    });
    this.stage.addEventListener("wheel", event => { // at the first and the last slice the page scrolls on
      if (event.ctrlKey || !event.deltaY || !this.item) return;
      if (this.step(Math.sign(event.deltaY))) event.preventDefault();
    }, {passive: false});
    let from = null;
    this.stage.addEventListener("pointerdown", event => {
      if (event.button) return;
      from = {x: event.clientX, y: event.clientY, ...this.state};
      this.stage.setPointerCapture(event.pointerId);
    });
    this.stage.addEventListener("pointermove", event => {
      if (from) this.window(from.brightness - (event.clientY - from.y) / 300, from.contrast * 2 ** ((event.clientX - from.x) / 120));
    });
    for (const name of ["pointerup", "pointercancel"]) this.stage.addEventListener(name, () => { from = null; });
    document.addEventListener("study:case", event => this.asked(event.detail));
  }

  // What is shown

  order() {
    const chosen = this.orders.value, value = item => {
      const scores = Object.values(item.dice).filter(v => v !== null);
      if (chosen === "apart") return Math.min(...scores) - Math.max(...scores);
      return (chosen ? item.dice[chosen] : mean(scores)) ?? 2;
    };
    this.sorted = [...this.data.cases].sort((a, b) => value(a) - value(b));
    this.cases.replaceChildren(...this.sorted.map(item => {
      const dice = chosen && chosen !== "apart" ? item.dice[chosen] : mean(Object.values(item.dice));
      return make("option", {value: this.data.cases.indexOf(item)}, `${item.case}, Dice ${score(dice)}`);
    }));
  }

  async open(item) {
    this.item = item;
    this.cases.value = this.data.cases.indexOf(item);
    await loaded(item);
    if (this.item !== item) return; // another was opened meanwhile
    const [count, high, wide] = item.shape, scale = Math.max(2, Math.round(720 / Math.max(high, wide)));
    Object.assign(this.canvas, {width: wide * scale, height: high * scale});
    for (const canvas of [this.canvas, ...this.thumbs]) canvas.style.aspectRatio = `${wide} / ${high * item.aspect}`;
    for (const canvas of this.thumbs) Object.assign(canvas, {width: wide, height: high});
    this.stage.style.maxWidth = `min(100%, calc(34rem * ${Math.min(1, wide / (high * item.aspect))}))`;
    this.slice.max = count - 1;
    this.table.replaceChildren(...this.data.structures.map((structure, k) => make("tr", {},
      make("th", {scope: "row"}, swatch(structure.color), structure.name),
      ...this.data.losses.map(loss => make("td", {}, score(item.structures[loss.key]?.[k]))))));
    this.go(item.start);
  }

  go(slice) { this.state.slice = slice; this.draw(); }
  step(by) {
    const slice = Math.min(this.item.shape[0] - 1, Math.max(0, this.state.slice + by)), moved = slice !== this.state.slice;
    if (moved) this.go(slice);
    return moved;
  }
  next(by) { const item = this.sorted[this.sorted.indexOf(this.item) + by]; if (item) this.open(item); }
  show(layer) {
    if (layer !== this.state.layer) this.former = this.state.layer;
    if (this.timer && this.item.predictions[layer]) this.flickered = layer;
    this.state.layer = layer;
    this.draw();
  }
  turn(layer) { this.show(this.state.layer === layer ? this.former ?? this.data.losses[0].key : layer); }
  allErrors() { const on = !this.state.errors.some(Boolean); this.state.errors.fill(on); this.errors.forEach(box => { box.checked = on; }); this.draw(); }
  window(brightness, contrast) {
    this.state.brightness = Math.min(1, Math.max(-1, brightness));
    this.state.contrast = Math.min(5.6, Math.max(.18, contrast));
    this.brightness.value = this.state.brightness * 100;
    this.contrast.value = Math.log2(this.state.contrast) * 40;
    this.draw();
  }
  flick() { // slower than three times a second
    if (this.timer) { clearInterval(this.timer); this.timer = null; this.show(this.flickered); }
    else {
      this.flickered = ["", "reference"].includes(this.state.layer) ? this.data.losses[0].key : this.state.layer;
      this.timer = setInterval(() => { this.state.layer = this.state.layer === "reference" ? this.flickered : "reference"; this.draw(); }, 600);
    }
    this.flicker.setAttribute("aria-pressed", Boolean(this.timer));
  }

  plane(name) { const [, high, wide] = this.item.shape; return this.item.planes[name].subarray(this.state.slice * high * wide, (this.state.slice + 1) * high * wide); }
  frame() { if (!this.waiting) this.waiting = requestAnimationFrame(() => { this.waiting = null; this.paint(); }); }
  draw() { if (this.item?.planes) this.frame(); }

  paint() {
    const {item, state} = this, [count, high, wide] = item.shape, size = [wide, high];
    const image = this.plane("image"), reference = this.plane("reference"), loss = item.predictions[state.layer] !== undefined ? state.layer : null;
    const context = this.canvas.getContext("2d"), line = Math.max(2, Math.round(this.canvas.width / 260));
    drawImage(context, image, size, state);
    const wanted = this.data.errors.map(([, color], k) => state.errors[k] ? color : null);
    if (loss && wanted.some(Boolean)) drawErrors(context, reference, this.plane(loss), size, wanted);
    if (item.planes[state.layer]) drawOutlines(context, this.plane(state.layer), size, this.colors, line);
    if (loss && state.line) drawOutlines(context, reference, size, "#fff", Math.max(1, Math.floor(line / 2)));
    this.layers.forEach((layer, k) => {
      const small = this.thumbs[k].getContext("2d");
      drawImage(small, image, size, state);
      if (layer.key && item.planes[layer.key]) drawOutlines(small, this.plane(layer.key), size, this.colors, 1);
      this.radios[k].checked = layer.key === state.layer;
      this.scores[k].textContent = item.slices[layer.key] ? score(item.slices[layer.key][state.slice]) : "";
    });
    this.countErrors(reference, loss && this.plane(loss));
    this.say(loss);
  }

  countErrors(reference, predicted) {
    const counts = this.data.errors.map(() => 0);
    if (predicted) reference.forEach((value, k) => { const error = errorAt(value, predicted[k]); if (error >= 0) counts[error]++; });
    this.areas.forEach((area, k) => { area.textContent = predicted ? counts[k] * this.item.pixels : "–"; });
  }

  say(loss) {
    const {item, state} = this, count = item.total, number = item.numbers[state.slice] + 1;
    const layer = this.layers.find(each => each.key === state.layer);
    this.slice.value = state.slice;
    this.slice.setAttribute("aria-valuetext", `slice ${number} of ${count}`);
    this.count.textContent = `${number} of ${count}`;
    this.corner.textContent = `${item.case} · ${number}/${count} · ${layer.name}`;
    const dice = loss ? `Dice of this slice ${score(item.slices[loss][state.slice])}, of the case ${score(item.dice[loss])}` : "no loss shown";
    const words = `${item.case}, slice ${number} of ${count}, ${layer.name}: ${dice}.`;
    this.canvas.setAttribute("aria-label", words);
    clearTimeout(this.saying); // a slider being moved says only where it came to rest; a flicker says nothing
    if (!this.timer) this.saying = setTimeout(() => { this.status.textContent = words; }, 150);
  }

  // A chart's point was chosen.
  async asked({dataset, name, loss, structure}) {
    if (dataset !== this.data.dataset) return;
    const item = this.data.cases.find(each => each.case === name) || this.sorted.find(each => each.patient === name);
    this.place.scrollIntoView({block: "start"});
    this.stage.focus({preventScroll: true});
    if (!item) {
      clearTimeout(this.saying);
      this.status.textContent = `${name} is not in this viewer, which holds ${this.data.cases.length} of ${this.data.count} cases.`;
      return;
    }
    if (loss && item.predictions[loss]) this.state.layer = loss;
    await this.open(item);
    const value = this.data.structures.find(each => each.name === structure)?.value;
    if (value) this.go(this.largest(value));
  }
  largest(value) { // the slice that holds most of a structure
    const [count, high, wide] = this.item.shape, sizes = new Array(count).fill(0);
    this.item.planes.reference.forEach((v, k) => { if (v === value) sizes[Math.floor(k / (high * wide))]++; });
    const most = Math.max(...sizes);
    return most ? sizes.indexOf(most) : this.item.start;
  }
}

function swatch(color) {
  const mark = make("i", {className: "swatch", aria: {hidden: "true"}});
  mark.style.background = color;
  return mark;
}

const start = () => document.querySelectorAll(".study-viewer").forEach((place, number) => {
  if (typeof DecompressionStream === "undefined") place.append(make("p", {}, "This browser is too old for the viewer; the figure shows three cases."));
  else new Viewer(place, number);
});
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
