// The viewer of one case: three cuts with masks, errors and probability. No library, no network.
//
// A case arrives as JSON (audit/browse.py writes it): `shape` and `offset` (slices, rows, columns) of the part of the
// grid that is embedded, `spacing_mm`, `start` (a slice), `regions`, `layers` (the reference first), `images` and the
// volumes as base64 of gzip: `masks` (a byte a voxel and layer, a bit a region), `probability` (a byte a voxel and
// region, `steps` is 1; "" where there is none).
"use strict";
const Viewer = (() => {
  const COLOURS = [[86, 180, 233], [240, 160, 20], [226, 130, 190]]; // reference, prediction, a second prediction
  const HEAT = [[20, 11, 53], [101, 21, 110], [188, 55, 84], [242, 118, 34], [252, 200, 70], [252, 255, 200]];
  const CUTS = ["axial", "coronal", "sagittal"];
  const css = (rgb) => `rgb(${rgb.join()})`;

  // ------------------------------------------------------------------------------------------------ reading a case

  async function unzip(text) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function readCase(facts) {
    const voxels = facts.shape[0] * facts.shape[1] * facts.shape[2];
    const [masks, probability, ...images] = await Promise.all(
      [facts.masks, facts.probability || null, ...facts.images.map((image) => image.voxels)].map((text) => text && unzip(text)),
    );
    const split = (bytes) => bytes && Array.from({ length: bytes.length / voxels }, (_, i) => bytes.subarray(i * voxels, (i + 1) * voxels));
    return { facts, layers: split(masks), probability: split(probability), images };
  }

  // How a cut walks through a volume: first voxel, steps to the next row and column; the head is up.
  function cutOf(name, [depth, height, width], [dz, dy, dx], [z, y, x]) {
    const slice = height * width, top = (depth - 1) * slice;
    if (name === "axial") return { rows: height, columns: width, first: z * slice, down: width, right: 1, size: [width * dx, height * dy] };
    if (name === "coronal") return { rows: depth, columns: width, first: top + y * width, down: -slice, right: 1, size: [width * dx, depth * dz] };
    return { rows: depth, columns: height, first: top + x, down: -slice, right: width, size: [height * dy, depth * dz] };
  }

  function walk(cut, visit) {
    for (let row = 0, pixel = 0; row < cut.rows; row++) {
      let voxel = cut.first + row * cut.down;
      for (let column = 0; column < cut.columns; column++, pixel++, voxel += cut.right) visit(pixel, voxel);
    }
  }

  // ------------------------------------------------------------------------------------------------------- drawing

  function paint(context, cut, colourOf, smooth) {
    const pixels = new ImageData(cut.columns, cut.rows);
    walk(cut, (pixel, voxel) => colourOf(voxel, pixels.data, 4 * pixel));
    const buffer = document.createElement("canvas");
    [buffer.width, buffer.height] = [cut.columns, cut.rows];
    buffer.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.drawImage(buffer, 0, 0, context.canvas.width, context.canvas.height);
  }

  function setPixel(data, at, [red, green, blue], alpha) {
    data[at] = red; data[at + 1] = green; data[at + 2] = blue; data[at + 3] = alpha;
  }

  // The outline of a mask half way between voxel centres (marching squares), as matplotlib draws it.
  function outline(context, cut, isInside, colour) {
    const { rows, columns } = cut;
    const inside = new Uint8Array((rows + 2) * (columns + 2)); // with a border of nothing
    let count = 0;
    walk(cut, (pixel, voxel) => {
      if (!isInside(voxel)) return;
      inside[(Math.floor(pixel / columns) + 1) * (columns + 2) + (pixel % columns) + 1] = 1;
      count += 1;
    });
    if (!count) return;
    const sx = context.canvas.width / columns, sy = context.canvas.height / rows;
    context.beginPath();
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const at = row * (columns + 2) + column;
        const corners = [inside[at], inside[at + 1], inside[at + columns + 3], inside[at + columns + 2]];
        const x = (column - 0.5) * sx, y = (row - 0.5) * sy; // the centre of the upper left voxel
        const middles = [[x + sx / 2, y], [x + sx, y + sy / 2], [x + sx / 2, y + sy], [x, y + sy / 2]];
        const crossed = middles.filter((_, side) => corners[side] !== corners[(side + 1) % 4]);
        for (let i = 0; i + 1 < crossed.length; i += 2) {
          context.moveTo(...crossed[i]);
          context.lineTo(...crossed[i + 1]);
        }
      }
    }
    context.strokeStyle = colour;
    context.lineWidth = 1.7 * (window.devicePixelRatio || 1);
    context.stroke();
  }

  function heatColour(share) {
    const place = share * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
    return HEAT[low].map((value, i) => Math.round(value + (place - low) * (HEAT[low + 1][i] - value)));
  }

  // -------------------------------------------------------------------------------------------------- one on a page

  class Viewer {
    constructor(root) {
      this.root = root;
      this.canvases = Object.fromEntries(CUTS.map((name) => [name, root.querySelector(`canvas[data-cut=${name}]`)]));
      this.find = (name) => root.querySelector(`[data-part=${name}]`);
      this.bind();
    }

    async show(facts, region) {
      this.ready = false;
      this.find("name").textContent = facts.name;
      this.find("about").textContent = facts.about;
      this.find("notes").replaceChildren(...facts.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
      this.case = await readCase(facts);
      const [, height, width] = facts.shape;
      this.at = [facts.start, Math.floor(height / 2), Math.floor(width / 2)];
      this.fill("modality", facts.images.map((image) => image.name));
      this.fill("region", facts.regions, Math.max(0, facts.regions.indexOf(region)));
      this.makeLayers();
      this.centre();
      const slider = this.find("slice");
      [slider.min, slider.max] = [facts.offset[0], facts.offset[0] + facts.shape[0] - 1];
      this.find("probability").closest("label").hidden = !this.case.probability;
      this.resetWindow();
      this.countSlices();
      this.ready = true;
      this.draw();
      this.root.dataset.case = facts.key;
    }

    fill(name, choices, selected = 0) {
      const select = this.find(name);
      select.replaceChildren(...choices.map((choice) => new Option(choice)));
      select.selectedIndex = selected;
      select.closest("label").hidden = choices.length < 2;
    }

    // A row of switches per layer: contour and fill; errors for predictions.
    makeLayers() {
      const names = this.case.facts.layers;
      if (this.layerNames === names.join("/")) return;
      this.layerNames = names.join("/");
      const make = (kind, layer, isOn) => {
        const label = document.createElement("label");
        const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: isOn });
        box.dataset.kind = kind;
        box.dataset.layer = layer;
        box.addEventListener("change", () => this.draw());
        label.append(box, ` ${kind}`);
        return label;
      };
      this.find("layers").replaceChildren(...names.map((name, layer) => {
        const group = document.createElement("span");
        const swatch = Object.assign(document.createElement("b"), { textContent: name });
        swatch.style.setProperty("--colour", css(COLOURS[layer]));
        group.className = "layer";
        group.setAttribute("role", "group");
        group.setAttribute("aria-label", name);
        group.append(swatch, make("contour", layer, true), make("fill", layer, false));
        if (layer) group.append(make("errors", layer, false));
        return group;
      }));
    }

    isOn(kind, layer) {
      return this.root.querySelector(`input[data-kind=${kind}][data-layer="${layer}"]`)?.checked ?? false;
    }

    inLayer(layer) {
      const voxels = this.case.layers[layer], bit = 1 << this.find("region").selectedIndex;
      return (voxel) => (voxels[voxel] & bit) !== 0;
    }

    get image() {
      return this.case.facts.images[this.find("modality").selectedIndex];
    }

    resetWindow() {
      this.window = [...this.image.window];
    }

    // Cut through the middle of what differs in the start slice, or of the reference there.
    centre() {
      const { shape, spacing_mm: spacing, layers } = this.case.facts;
      const cut = cutOf("axial", shape, spacing, this.at);
      const tests = layers.map((_, layer) => this.inLayer(layer));
      for (const isHere of [(v) => tests[0](v) !== tests[1](v), tests[0], tests[1]]) {
        let rows = 0, columns = 0, count = 0;
        walk(cut, (pixel, voxel) => {
          if (!isHere(voxel)) return;
          rows += Math.floor(pixel / cut.columns); columns += pixel % cut.columns; count += 1;
        });
        if (count) {
          this.at = [this.at[0], Math.round(rows / count), Math.round(columns / count)];
          return;
        }
      }
    }

    countSlices() {
      const { shape, spacing_mm: spacing, layers } = this.case.facts;
      this.counts = layers.map((_, layer) => {
        const isInside = this.inLayer(layer);
        return Array.from({ length: shape[0] }, (__, z) => {
          let count = 0;
          walk(cutOf("axial", shape, spacing, [z, 0, 0]), (pixel, voxel) => { count += isInside(voxel); });
          return count;
        });
      });
    }

    draw() {
      if (!this.ready) return;
      for (const name of CUTS) this.drawCut(name);
      this.drawStrip();
      this.describe();
    }

    drawCut(name) {
      const canvas = this.canvases[name], { shape, spacing_mm: spacing, steps } = this.case.facts;
      const cut = cutOf(name, shape, spacing, this.at);
      this.fit(canvas, cut.size, name);
      const context = canvas.getContext("2d"), voxels = this.case.images[this.find("modality").selectedIndex];
      const [low, high] = this.window, range = Math.max(high - low, 1);
      paint(context, cut, (voxel, data, at) => {
        const grey = Math.max(0, Math.min(255, (255 * (voxels[voxel] - low)) / range));
        setPixel(data, at, [grey, grey, grey], 255);
      }, true);
      const probability = this.case.probability?.[this.find("region").selectedIndex];
      if (probability && this.find("probability").checked) {
        paint(context, cut, (voxel, data, at) => {
          const share = probability[voxel] / steps; // the unlikely hides little
          if (share) setPixel(data, at, heatColour(share), Math.min(200, 450 * share));
        }, false);
      }
      this.drawMasks(context, cut);
      this.drawCross(context, cut, name);
    }

    drawMasks(context, cut) {
      const layers = this.case.facts.layers.map((_, layer) => layer), isReference = this.inLayer(0);
      const wrong = layers.find((layer) => this.isOn("errors", layer));
      if (wrong !== undefined) { // errors alone: too much in the prediction's colour, missed in the reference's
        const isPredicted = this.inLayer(wrong);
        paint(context, cut, (voxel, data, at) => {
          if (isPredicted(voxel) !== isReference(voxel)) setPixel(data, at, COLOURS[isPredicted(voxel) ? wrong : 0], 220);
        }, false);
        return;
      }
      for (const layer of layers.filter((each) => this.isOn("fill", each))) {
        const isInside = this.inLayer(layer);
        paint(context, cut, (voxel, data, at) => { if (isInside(voxel)) setPixel(data, at, COLOURS[layer], 105); }, false);
      }
      for (const layer of layers.filter((each) => this.isOn("contour", each))) {
        outline(context, cut, this.inLayer(layer), css(COLOURS[layer]));
      }
    }

    // Thin lines where the other two cuts are.
    drawCross(context, cut, name) {
      const [z, y, x] = this.at, depth = this.case.facts.shape[0];
      const [row, column] = { axial: [y, x], coronal: [depth - 1 - z, x], sagittal: [depth - 1 - z, y] }[name];
      const { width, height } = context.canvas;
      context.fillStyle = "rgba(255,255,255,.3)";
      context.fillRect(0, ((row + 0.5) * height) / cut.rows, width, 1);
      context.fillRect(((column + 0.5) * width) / cut.columns, 0, 1, height);
    }

    fit(canvas, [widthMm, heightMm], name) {
      const room = canvas.parentElement.clientWidth;
      const most = (window.innerHeight || 800) * (name === "axial" ? 0.62 : 0.29);
      const scale = Math.min(room / widthMm, most / heightMm);
      const ratio = window.devicePixelRatio || 1, [width, height] = [widthMm * scale, heightMm * scale];
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      [canvas.width, canvas.height] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
    }

    // Along the slices: the reference's area upwards, each prediction's below.
    drawStrip() {
      const canvas = this.find("strip"), ratio = window.devicePixelRatio || 1;
      [canvas.width, canvas.height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
      const context = canvas.getContext("2d"), { width, height } = canvas, depth = this.case.facts.shape[0];
      const most = Math.max(1, ...this.counts.flat()), lane = height / this.counts.length, step = width / depth;
      this.counts.forEach((counts, layer) => {
        context.fillStyle = css(COLOURS[layer]);
        counts.forEach((count, z) => {
          const tall = count ? Math.max(2 * ratio, (count / most) * (lane - 2)) : 0;
          context.fillRect(z * step, layer ? layer * lane + 1 : lane - tall - 1, Math.max(1, step - ratio / 2), tall);
        });
      });
      context.fillStyle = "rgba(255,255,255,.9)";
      context.fillRect((this.at[0] + 0.5) * step - ratio, 0, 2 * ratio, height);
    }

    describe() {
      const { offset, shape, spacing_mm: spacing, layers } = this.case.facts, z = this.at[0], slider = this.find("slice");
      const square = (spacing[1] * spacing[2]) / 100;
      const areas = layers.map((name, layer) => `${name} ${(this.counts[layer][z] * square).toFixed(1)} cm\u00b2`);
      const text = `axial slice ${z + offset[0]} (shown: ${offset[0]} to ${offset[0] + shape[0] - 1}): ${areas.join(", ")}`;
      this.find("readout").textContent = text;
      slider.value = z + offset[0];
      slider.setAttribute("aria-valuetext", text);
    }

    // ---------------------------------------------------------------------------------------------- mouse and keys

    move(axis, value) {
      if (!this.ready) return;
      this.at[axis] = Math.max(0, Math.min(this.case.facts.shape[axis] - 1, value));
      this.draw();
    }

    toggle(kind) {
      const boxes = [...this.root.querySelectorAll(`input[data-kind=${kind}]`)];
      const isOn = !boxes.every((box) => box.checked);
      for (const box of kind === "errors" ? boxes.slice(0, 1) : boxes) box.checked = isOn;
      this.draw();
    }

    bind() {
      this.find("slice").addEventListener("input", (event) => this.move(0, Number(event.target.value) - this.case.facts.offset[0]));
      this.find("region").addEventListener("change", () => { this.countSlices(); this.draw(); });
      this.find("modality").addEventListener("change", () => { this.resetWindow(); this.draw(); });
      this.find("probability").addEventListener("change", () => this.draw());
      this.find("window").addEventListener("click", () => { this.resetWindow(); this.draw(); });
      this.find("strip").addEventListener("pointerdown", (event) => this.seek(event));
      this.find("strip").addEventListener("pointermove", (event) => event.buttons && this.seek(event));
      CUTS.forEach((name, axis) => this.bindCut(this.canvases[name], name, axis));
      this.root.addEventListener("keydown", (event) => this.press(event));
      new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(this.root);
    }

    seek(event) {
      const box = event.target.getBoundingClientRect();
      this.move(0, Math.floor(((event.clientX - box.left) / box.width) * this.case.facts.shape[0]));
    }

    bindCut(canvas, name, axis) {
      let start = null;
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.move(axis, this.at[axis] + Math.sign(event.deltaY));
      }, { passive: false });
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        start = { x: event.clientX, y: event.clientY, window: [...this.window], hasMoved: false };
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!start) return;
        const [right, down] = [event.clientX - start.x, event.clientY - start.y];
        start.hasMoved ||= Math.hypot(right, down) > 3;
        if (start.hasMoved) this.setWindow(start.window, right, down);
      });
      canvas.addEventListener("pointerup", (event) => {
        if (start && !start.hasMoved) this.point(canvas, name, event);
        start = null;
      });
      canvas.addEventListener("pointercancel", () => { start = null; });
    }

    // To the right widens the window, upwards makes the picture brighter.
    setWindow([low, high], right, down) {
      const width = Math.max(4, high - low + right), level = (low + high) / 2 + down / 2;
      this.window = [level - width / 2, level + width / 2];
      this.draw();
    }

    point(canvas, name, event) {
      const { shape, spacing_mm: spacing } = this.case.facts, cut = cutOf(name, shape, spacing, this.at);
      const box = canvas.getBoundingClientRect(), inside = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
      const column = inside((event.clientX - box.left) / box.width, cut.columns);
      const row = inside((event.clientY - box.top) / box.height, cut.rows);
      const [z, y, x] = this.at, up = shape[0] - 1 - row;
      this.at = { axial: [z, row, column], coronal: [up, y, column], sagittal: [up, column, x] }[name];
      this.draw();
    }

    press(event) {
      if (!this.ready || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
      const isSlider = event.target.matches("input[type=range]");
      const moves = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
      const kinds = { c: "contour", f: "fill", e: "errors" };
      const axis = Math.max(0, CUTS.indexOf(event.target.dataset?.cut));
      if (event.key in moves && !isSlider) this.move(axis, this.at[axis] + moves[event.key]);
      else if (event.key in kinds) this.toggle(kinds[event.key]);
      else if (event.key === "p" && this.case.probability) this.find("probability").click();
      else if (event.key === "r") this.find("window").click();
      else return;
      event.preventDefault();
    }
  }

  return Viewer;
})();
