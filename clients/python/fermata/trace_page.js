// Draws the tokens of a trace page: one stacked bar each, as far as they fit, the rest by scrolling.
// The data is in the page; everything that can be said without drawing stands there as text already.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.querySelector(".chart");
  if (!chart) return;
  const scroller = chart.querySelector(".scroller");
  const spacer = chart.querySelector(".spacer");
  const canvas = chart.querySelector(".window");
  const overview = document.getElementById("overview");
  const tip = document.getElementById("tip");
  const HEIGHT = 320, LEFT = 58, TOP = 26, BOTTOM = 26, NARROWEST = 4, WIDEST = 22;
  let choice = data.choices[0], whole = false, chosen = -1, lit = "", colours = {}, bar = NARROWEST, room = 0;

  const readColours = () => {
    const style = getComputedStyle(document.documentElement);
    colours = Object.fromEntries(["text", "muted", "line", "alarm", "accent", "card", "faint",
      ...data.parts.map((part) => "part-" + part.name)].map((name) => [name, style.getPropertyValue("--" + name).trim()]));
  };
  const time = (us) => {
    if (Math.abs(us) < 999.5) return `${Math.round(us)} µs`;
    return Math.abs(us) < 999950 ? `${(us / 1e3).toFixed(1)} ms` : `${(us / 1e6).toFixed(2)} s`;
  };
  const round = (us) => time(us).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
  const partsOf = (index) => data.parts
    .map((part) => ({ ...part, value: (choice.parts[part.name] || [])[index] || 0 })).filter((part) => part.value);
  const heightOf = (index) => partsOf(index).reduce((sum, part) => sum + Math.max(part.value, 0), 0);
  const top = () => (whole ? choice.highest : choice.top);

  const prepared = (element, width, height) => {
    const ratio = window.devicePixelRatio || 1;
    element.width = Math.round(width * ratio);
    element.height = Math.round(height * ratio);
    element.style.width = `${width}px`;
    element.style.height = `${height}px`;
    const pen = element.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    return pen;
  };

  // Round numbers that divide a range into at most `most` steps.
  const ticks = (range, most) => {
    const rough = Math.max(range, 1) / most, power = 10 ** Math.floor(Math.log10(rough));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  };

  const draw = () => {
    const pen = prepared(canvas, scroller.clientWidth, HEIGHT);
    const width = scroller.clientWidth, scale = (HEIGHT - TOP - BOTTOM) / (top() + choice.bottom);
    const zero = TOP + top() * scale, count = choice.offsets.length;
    const begin = Math.max(Math.floor(scroller.scrollLeft / bar), 0);
    const end = Math.min(Math.ceil((scroller.scrollLeft + room) / bar), count);
    const left = (index) => LEFT + index * bar - scroller.scrollLeft;
    grid(pen, width, zero, scale);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, width - LEFT, HEIGHT);
    pen.clip();
    if (chosen >= 0) {
      pen.fillStyle = colours.faint;
      pen.fillRect(left(chosen), TOP - 8, bar, HEIGHT - TOP - BOTTOM + 8);
    }
    for (let index = begin; index < end; index++) stack(pen, index, left(index), zero, scale);
    limits(pen, width, zero, scale);
    marks(pen, begin, end, left, zero, scale);
    numbers(pen, begin, end, left);
    pen.restore();
  };

  const grid = (pen, width, zero, scale) => {
    const step = ticks(top() + choice.bottom, 6);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let value = -Math.floor(choice.bottom / step) * step; value <= top(); value += step) {
      const y = Math.round(zero - value * scale) + 0.5;
      pen.strokeStyle = value === 0 ? colours.muted : colours.line;
      pen.beginPath();
      pen.moveTo(LEFT, y);
      pen.lineTo(width, y);
      pen.stroke();
      pen.fillStyle = colours.muted;
      pen.fillText(value === 0 ? "0" : round(value), LEFT - 8, y);
    }
  };

  const stack = (pen, index, x, zero, scale) => {
    const wide = bar > 6 ? bar - 2 : bar - 1, high = top();
    let above = 0, below = 0;
    for (const part of partsOf(index)) {
      pen.globalAlpha = lit && lit !== part.name ? 0.15 : part.value < 0 ? 0.55 : 1;
      pen.fillStyle = colours["part-" + part.name];
      if (part.value > 0) {
        const from = Math.min(above, high), to = Math.min(above + part.value, high);
        pen.fillRect(x, zero - to * scale, wide, (to - from) * scale);
        above += part.value;
      } else {
        const from = Math.min(below, choice.bottom), to = Math.min(below - part.value, choice.bottom);
        pen.fillRect(x, zero + from * scale, wide, (to - from) * scale);
        below -= part.value;
      }
    }
    pen.globalAlpha = 1;
    if (above > high * 1.0001) {
      // It goes on: a slanting gap, as in a torn strip.
      pen.fillStyle = colours.card;
      pen.beginPath();
      pen.moveTo(x - 1, TOP + 12);
      pen.lineTo(x + wide + 1, TOP + 7);
      pen.lineTo(x + wide + 1, TOP + 10);
      pen.lineTo(x - 1, TOP + 15);
      pen.fill();
    }
  };

  const limits = (pen, width, zero, scale) => {
    if (choice.slow > top()) return;
    const y = Math.round(zero - choice.slow * scale) + 0.5;
    pen.strokeStyle = colours.alarm;
    pen.globalAlpha = 0.7;
    pen.setLineDash([4, 4]);
    pen.beginPath();
    pen.moveTo(LEFT, y);
    pen.lineTo(width, y);
    pen.stroke();
    pen.setLineDash([]);
    pen.globalAlpha = 1;
  };

  const marks = (pen, begin, end, left, zero, scale) => {
    pen.textAlign = "center";
    pen.textBaseline = "bottom";
    const labels = [];
    for (let index = begin; index < end; index++) {
      const offset = choice.offsets[index];
      if (!(offset in choice.verdicts)) continue;
      const y = zero - Math.min(heightOf(index), top()) * scale, x = left(index) + bar / 2;
      const text = `${offset} · ${time(choice.intervals[index])}`, half = pen.measureText(text).width / 2;
      pen.fillStyle = offset ? colours.alarm : colours.muted;
      pen.beginPath();
      pen.arc(x, y - 5, 2.5, 0, 7);
      pen.fill();
      const middle = Math.min(Math.max(x, LEFT + half), LEFT + room - half);
      labels.push({ text, y, half, x: middle, colour: pen.fillStyle, interval: choice.intervals[index] });
    }
    // The slowest has its label; who would write over it has none.
    const written = [];
    for (const label of labels.sort((a, b) => b.interval - a.interval)) {
      if (written.some((other) => Math.abs(other.x - label.x) < other.half + label.half + 8 && Math.abs(other.y - label.y) < 18)) continue;
      written.push(label);
      pen.fillStyle = label.colour;
      pen.fillText(label.text, label.x, label.y - 9);
    }
  };

  const numbers = (pen, begin, end, left) => {
    const step = Math.max(ticks(end - begin, room / 70), 1);
    pen.textAlign = "center";
    pen.textBaseline = "top";
    pen.fillStyle = colours.muted;
    for (let index = begin; index < end; index++) {
      if (choice.offsets[index] % step === 0) pen.fillText(choice.offsets[index], Math.max(left(index) + bar / 2, LEFT + 6), HEIGHT - BOTTOM + 8);
    }
  };

  // The whole generation in the width of the chart: each column is as high as the slowest of its tokens.
  const drawOverview = () => {
    overview.hidden = choice.offsets.length * bar <= room + 1;
    if (overview.hidden) return;
    const width = scroller.clientWidth, high = 34, count = choice.offsets.length, pen = prepared(overview, width, high);
    const shown = [scroller.scrollLeft / bar, (scroller.scrollLeft + room) / bar].map((index) => LEFT + (index / count) * (width - LEFT));
    pen.fillStyle = colours.faint;
    pen.fillRect(shown[0], 0, Math.max(shown[1] - shown[0], 3), high);
    pen.strokeStyle = colours.accent;
    pen.strokeRect(shown[0] + 0.5, 0.5, Math.max(shown[1] - shown[0], 3) - 1, high - 1);
    const columns = Math.min(count, Math.floor(width - LEFT)), wide = (width - LEFT) / columns;
    for (let column = 0; column < columns; column++) {
      const from = Math.floor((column * count) / columns), to = Math.floor(((column + 1) * count) / columns);
      let most = 0, slow = false;
      for (let index = from; index < to; index++) {
        most = Math.max(most, choice.intervals[index]);
        slow = slow || choice.offsets[index] in choice.verdicts;
      }
      const tall = Math.max(Math.min(most / choice.top, 1) * (high - 2), 1);
      pen.fillStyle = slow ? colours.alarm : colours.muted;
      pen.fillRect(LEFT + column * wide, high - tall, Math.max(wide, 1), tall);
    }
  };

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  const describe = (index) => {
    const offset = choice.offsets[index], heading = element("p");
    heading.append(element("span", `token ${offset}`), element("span", time(choice.intervals[index])));
    const list = element("ul");
    const parts = partsOf(index).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 7);
    for (const part of parts) {
      const row = element("li"), swatch = element("i", undefined, "swatch");
      swatch.style.background = colours["part-" + part.name];
      row.append(swatch, element("span", part.title), element("span", time(part.value)));
      list.append(row);
    }
    const lines = [heading, list];
    if (choice.verdicts[offset]) lines.push(element("p", choice.verdicts[offset]));
    if (choice.steps[index]) {
      const step = data.steps[`${choice.shards[index]} ${choice.steps[index]}`];
      const mates = step && step.map(([name, length]) => `${data.names[name]} (${length})`);
      const said = !step ? "no longer remembered" : mates.length ? `with ${mates.slice(0, 4).join(", ")}${mates.length > 4 ? ` and ${mates.length - 4} more` : ""}` : "alone";
      lines.push(element("p", `step ${choice.steps[index]}: ${said}`, "mates"));
    }
    tip.replaceChildren(...lines);
  };

  const choose = (index, reveal) => {
    chosen = index;
    tip.hidden = index < 0;
    if (index >= 0) {
      if (reveal) scroller.scrollLeft = Math.max((index + 0.5) * bar - room / 2, 0);
      describe(index);
      const x = LEFT + (index + 0.5) * bar - scroller.scrollLeft;
      const beside = x + 16 + tip.offsetWidth > scroller.clientWidth ? x - 16 - tip.offsetWidth : x + 16;
      tip.style.left = `${Math.max(Math.min(beside, scroller.clientWidth - tip.offsetWidth), 0)}px`;
      tip.style.top = `${TOP}px`;
    }
    draw();
  };

  const layOut = () => {
    room = scroller.clientWidth - LEFT;
    bar = Math.min(Math.max(room / choice.offsets.length, NARROWEST), WIDEST);
    spacer.style.width = `${LEFT + choice.offsets.length * bar}px`;
    draw();
    drawOverview();
  };

  const at = (event) => {
    const x = event.clientX - canvas.getBoundingClientRect().left - LEFT;
    const index = Math.floor((x + scroller.scrollLeft) / bar);
    return x >= 0 && index < choice.offsets.length ? index : -1;
  };
  canvas.addEventListener("pointermove", (event) => { const index = at(event); if (index !== chosen) choose(index); });
  canvas.addEventListener("pointerdown", (event) => choose(at(event)));
  canvas.addEventListener("pointerleave", () => choose(-1));
  canvas.addEventListener("blur", () => choose(-1));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.min(Math.max(chosen + step, 0), choice.offsets.length - 1), true);
  });
  scroller.addEventListener("scroll", () => { draw(); drawOverview(); });
  const jump = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const share = (event.clientX - overview.getBoundingClientRect().left - LEFT) / (scroller.clientWidth - LEFT);
    scroller.scrollLeft = share * choice.offsets.length * bar - room / 2;
  };
  overview.addEventListener("pointerdown", jump);
  overview.addEventListener("pointermove", jump);

  const press = (buttons, pressed) => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === pressed)));
  const tabs = [...document.querySelectorAll("[data-choice]")];
  const show = (number) => {
    choice = data.choices.find((item) => item.choice === number);
    press(tabs, tabs.find((tab) => Number(tab.dataset.choice) === number));
    chosen = -1;
    tip.hidden = true;
    layOut();
  };
  tabs.forEach((tab) => tab.addEventListener("click", () => show(Number(tab.dataset.choice))));
  document.getElementById("whole").addEventListener("click", (event) => {
    whole = !whole;
    event.target.setAttribute("aria-pressed", String(whole));
    draw();
  });
  const keys = [...document.querySelectorAll("[data-part]")];
  keys.forEach((key) => key.addEventListener("click", () => {
    lit = lit === key.dataset.part ? "" : key.dataset.part;
    press(keys, lit ? key : undefined);
    draw();
  }));
  document.querySelectorAll("[data-token]").forEach((link) => link.addEventListener("click", () => {
    const [number, offset] = link.dataset.token.split(" ").map(Number);
    if (choice.choice !== number) show(number);
    chart.scrollIntoView({ block: "center" });
    canvas.focus({ preventScroll: true });
    choose(choice.offsets.indexOf(offset), true);
  }));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); layOut(); });
  new ResizeObserver(layOut).observe(chart);
  readColours();
  layOut();
})();
