"use strict";
// Draws every <div class="plot"> from the JSON in #charts, at its real width, and again on resize.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, attributes, parent) => {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(node);
    return node;
  };

  const format = (value) => {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(4)));
  };

  // Round values in [low, high], about `count` of them, a multiple of 1, 2 or 5 apart.
  const ticks = (low, high, count, whole) => {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    let gap = [1, 2, 5, 10].map((m) => m * power).find((g) => g >= rough * 0.999);
    if (whole) gap = Math.max(1, Math.round(gap));
    const found = [];
    for (let i = Math.ceil(low / gap - 1e-9); i * gap <= high + gap * 1e-9; i++) found.push(Number((i * gap).toPrecision(12)));
    return found;
  };

  const range = (spec) => {
    const ys = spec.series.flatMap((s) => s.y);
    const xs = spec.series.flatMap((s) => s.x);
    const least = (values) => values.reduce((a, b) => Math.min(a, b));
    const most = (values) => values.reduce((a, b) => Math.max(a, b));
    let low = spec.zero ? Math.min(0, least(ys)) : least(ys);
    let high = most(ys);
    const pad = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
    if (!spec.zero) low = low >= 0 ? Math.max(0, low - pad) : low - pad;
    high += pad;
    let [first, last] = [least(xs), most(xs)];
    if (first === last) { first -= 1; last += 1; }
    return { low, high, first, last };
  };

  const draw = (box) => {
    const spec = charts[box.dataset.chart];
    const width = box.clientWidth;
    const height = Number(box.dataset.height);
    if (!width) return;
    const { low, high, first, last } = range(spec);
    const yTicks = ticks(low, high, height / 48, false);
    const left = 14 + 6.8 * Math.max(...yTicks.map((t) => format(t).length));
    const [right, top, bottom] = [14, 10, 24];
    const px = (x) => left + ((x - first) / (last - first)) * (width - left - right);
    const py = (y) => height - bottom - ((y - low) / (high - low)) * (height - top - bottom);
    box.replaceChildren();
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.label }, box);
    for (const t of yTicks) {
      make("line", { class: "grid", x1: left, x2: width - right, y1: py(t), y2: py(t) }, svg);
      make("text", { x: left - 8, y: py(t) + 4, "text-anchor": "end" }, svg).textContent = format(t);
    }
    make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, svg);
    const xTicks = ticks(first, last, Math.min(10, (width - left) / 62), true).filter((t) => t >= 0);
    for (const t of xTicks) {
      const text = format(t);
      const half = text.length * 3.4;
      const x = Math.min(Math.max(px(t), left - 4 + half), width - half - 2);
      make("line", { class: "axis", x1: px(t), x2: px(t), y1: height - bottom, y2: height - bottom + 4 }, svg);
      make("text", { x, y: height - 6, "text-anchor": "middle" }, svg).textContent = text;
    }
    for (const s of spec.series) {
      const points = s.x.map((x, i) => `${px(x).toFixed(1)} ${py(s.y[i]).toFixed(1)}`);
      if (spec.area) make("path", { class: "area", d: `M${px(s.x[0])} ${py(low)}L${points.join("L")}L${px(s.x.at(-1))} ${py(low)}Z` }, svg);
      make("path", { class: `line ${s.role} ${s.mark}`, d: `M${points.join("L")}` }, svg);
      // Few held-out points are marked each; a long series would be a caterpillar.
      if ((s.mark === "dashed" && s.x.length <= 60) || s.x.length === 1)
        s.x.forEach((x, i) => make("circle", { class: `dot ${s.role}`, cx: px(x), cy: py(s.y[i]), r: 4 }, svg));
    }
    hover(box, svg, spec, { px, py, first, last, left, right, width, height, top, bottom });
  };

  const nearest = (values, wanted) => {
    let best = 0;
    values.forEach((v, i) => { if (Math.abs(v - wanted) < Math.abs(values[best] - wanted)) best = i; });
    return best;
  };

  const hover = (box, svg, spec, at) => {
    const layer = make("g", { visibility: "hidden" }, svg);
    const cross = make("line", { class: "cross", y1: at.top, y2: at.height - at.bottom }, layer);
    const named = spec.series.filter((s) => s.name);
    const dots = named.map((s) => make("circle", { class: `dot ${s.role}`, r: 4 }, layer));
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    box.appendChild(tip);
    box.onpointerleave = () => { tip.hidden = true; layer.setAttribute("visibility", "hidden"); };
    box.onpointermove = (event) => {
      const x = event.clientX - box.getBoundingClientRect().left;
      const wanted = at.first + ((x - at.left) / (at.width - at.left - at.right)) * (at.last - at.first);
      const hits = named.map((s) => nearest(s.x, wanted));
      const step = named.map((s, k) => s.x[hits[k]]).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      cross.setAttribute("x1", at.px(step));
      cross.setAttribute("x2", at.px(step));
      tip.replaceChildren();
      const title = document.createElement("b");
      title.textContent = `step ${step.toLocaleString("en-US")}`;
      tip.append(title);
      named.forEach((s, k) => {
        const shown = s.x[hits[k]] === step;
        dots[k].setAttribute("visibility", shown ? "inherit" : "hidden");
        if (!shown) return;
        dots[k].setAttribute("cx", at.px(step));
        dots[k].setAttribute("cy", at.py(s.y[hits[k]]));
        const row = document.createElement("div");
        const key = document.createElement("i");
        key.className = s.role;
        row.append(key, `${s.name} ${format(s.y[hits[k]])}${spec.unit ? " " + spec.unit : ""}`);
        tip.append(row);
      });
      tip.hidden = false;
      layer.setAttribute("visibility", "visible");
      const place = at.px(step) + 12;
      tip.style.left = `${Math.max(0, place + tip.offsetWidth > at.width ? at.px(step) - 12 - tip.offsetWidth : place)}px`;
      tip.style.top = `${at.top}px`;
    };
  };

  const boxes = [...document.querySelectorAll(".plot[data-chart]")];
  const widths = new Map();
  const redraw = () => boxes.forEach((box) => {
    if (widths.get(box) === box.clientWidth) return;
    widths.set(box, box.clientWidth);
    draw(box);
  });
  redraw();
  new ResizeObserver(redraw).observe(document.body);
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    redraw();
  });
})();
