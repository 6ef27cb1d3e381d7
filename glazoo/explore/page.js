// What is seen: settings on top, then what two memories recall, token by token.

const tenths = (from, to) => Array.from({ length: to - from + 1 }, (_, i) => (from + i) / 10);
const TASK = {
  pairs: ["Pairs", Array.from({ length: 16 }, (_, i) => i + 1)],
  overlap: ["Overlap of keys: mean cosine", tenths(0, 9)],
  noise: ["Noise of a written value", [0, 0.25, 0.5, 1, 1.5, 2, 3]],
};
const CHOICES = {
  writes: ["Every pair is written", {
    once: "once",
    repeated: "three times, shuffled",
    overwritten: "over another value",
  }],
  along: ["What keys share is", { channels: "two of the channels", anywhere: "any direction" }],
};
const GATES = {
  decay: ["Decay a, what a token leaves of the old", [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1]],
  write: ["Write gate beta", tenths(1, 10)],
  importance: ["Importance gate b", [0, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]],
  prior: ["Prior importance I_p", [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]],
  erase: ["Own erase gate", tenths(0, 10)],
  key_scale: ["Length of keys before the feature map", [0.25, 0.5, 1, 2, 4, 8]],
};
const DRAWS = 20;
const SIDES = ["first", "second"];

const SVG = "http://www.w3.org/2000/svg";
function build(create, tag, attributes, children) {
  const element = create(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}
const h = (tag, attributes = {}, ...children) =>
  build(name => document.createElement(name), tag, attributes, children);
const s = (tag, attributes = {}, ...children) =>
  build(name => document.createElementNS(SVG, name), tag, attributes, children);
const round = x => (Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(2));
const percent = x => `${Math.round(100 * x)} %`;

const root = document.getElementById("glazoo-explore");
const variants = new Map(DATA.variants.map(variant => [variant.name, variant]));
const form = ([name, label]) => variants.get(name)?.forms.find(x => x.label === label);
const offered = DATA.presets.filter(preset => preset.memories.every(form));
const settings = {
  task: { ...DATA.presets[0].task, seed: 1 },
  gates: { ...DATA.presets[0].gates },
  memories: [],
};
const scores = SIDES.map(() => ({ share: h("span", { class: "share" }), over: h("span"), now: h("span") }));
let result, at = 0, timer = null, later = null;

// A variant, and what it has beside itself: its metaplastic form, or another variant.
function usual(one = DATA.variants[0]) {
  const other = DATA.variants.find(x => x !== one) ?? one;
  const second = one.forms[1] ? [one.name, one.forms[1].label] : [other.name, other.forms[0].label];
  return [[one.name, one.forms[0].label], second];
}

function choose(preset) {
  const [plain] = DATA.presets;
  settings.memories = preset ? preset.memories.map(x => [...x]) : usual();
  settings.task = { ...plain.task, ...preset?.task, seed: 1 };
  settings.gates = { ...plain.gates, ...preset?.gates };
  lesson.textContent = preset?.text ?? "Choose two memories, and move the sliders.";
  for (const button of presets.children) button.setAttribute("aria-pressed", button.textContent === preset?.title);
  fillControls();
  compute();
}

// Settings -------------------------------------------------------------------------------------

const controls = {};

function changed() {
  for (const button of presets.children) button.setAttribute("aria-pressed", false);
  lesson.textContent = "Your own settings. What differs between the two memories, and at which age of a pair?";
  compute();
}

function slider(group, name, [title, values]) {
  const shown = h("output");
  const input = h("input", {
    type: "range", min: 0, max: values.length - 1, step: 1, id: `gx-${name}`,
    oninput: () => {
      settings[group][name] = values[input.value];
      show();
      changed();
    },
  });
  const show = () => {
    shown.textContent = String(settings[group][name]);
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  const whole = h("label", { for: input.id }, h("span", { class: "name" }, h("span", {}, title), shown), input);
  controls[name] = {
    whole,
    input,
    fill() {
      input.value = values.indexOf(settings[group][name]);
      show();
    },
  };
  return whole;
}

function choice(name, [title, options]) {
  const select = h("select", {
    id: `gx-${name}`,
    onchange: () => {
      settings.task[name] = select.value;
      changed();
    },
  }, ...Object.entries(options).map(([value, text]) => h("option", { value }, text)));
  controls[name] = { fill: () => (select.value = settings.task[name]) };
  return h("label", { for: select.id }, h("span", { class: "name" }, title), select);
}

function memory(side) {
  const fillForms = () => {
    const [name, label] = settings.memories[side];
    forms.replaceChildren(...variants.get(name).forms.map(x => h("option", { value: x.label }, x.label)));
    forms.value = label;
  };
  const variant = h("select", {
    "aria-label": `Variant of the ${SIDES[side]} memory`,
    onchange: () => {
      const [, label] = settings.memories[side];
      const kept = form([variant.value, label]) ?? variants.get(variant.value).forms[0];
      settings.memories[side] = [variant.value, kept.label];
      fillForms();
      changed();
    },
  }, ...DATA.variants.map(x => h("option", { value: x.name }, x.title)));
  const forms = h("select", {
    "aria-label": `Form of the ${SIDES[side]} memory`,
    onchange: () => {
      settings.memories[side] = [variant.value, forms.value];
      changed();
    },
  });
  controls[SIDES[side]] = {
    fill() {
      variant.value = settings.memories[side][0];
      fillForms();
    },
  };
  return h("div", { class: `memory ${SIDES[side]}` }, h("div", { class: "pair" }, variant, forms),
    h("p", { class: "score" }, scores[side].share, scores[side].over),
    h("p", {}, scores[side].now));
}

function fillControls() {
  for (const control of Object.values(controls)) control.fill();
}

// A gate that neither program takes is there, but faint. Noise is what the decay loses of a prior.
function showTaken(programs) {
  const takes = (program, name) => program.operands.some(operand => operand.fill === name);
  const taken = {
    ...Object.fromEntries(Object.keys(GATES).map(name => [name, programs.some(p => takes(p, name))])),
    decay: programs.some(p => takes(p, "decay") || takes(p, "noise")),
    key_scale: programs.some(p => p.own_scale),
  };
  for (const name of Object.keys(GATES)) {
    const { whole, input } = controls[name];
    whole.classList.toggle("idle", !taken[name]);
    whole.title = taken[name] ? "" : "Neither of the two memories takes it.";
    input.disabled = !taken[name];
  }
}

// Computing ------------------------------------------------------------------------------------

function compute() {
  try {
    evaluate();
  } catch (error) {
    said.textContent = `This cannot be evaluated: ${error.message}.`;
    throw error;
  }
}

function evaluate() {
  const task = makeTask(settings.task, DATA.sizes);
  const programs = settings.memories.map(form);
  const runs = programs.map(program => explore(program, settings.gates, task, DATA.sizes));
  // Pairs by their last write: the oldest first.
  const last = task.keys.map((_, pair) => task.writes.map(w => w.pair).lastIndexOf(pair) + 1);
  const rows = task.keys.map((_, pair) => pair).sort((x, y) => last[x] - last[y]);
  result = { task, programs, runs, rows, tokens: task.writes.length };
  at = result.tokens;
  moment.max = at;
  showTaken(programs);
  clearTimeout(later);
  draws = [];
  draw();
  later = setTimeout(drawAll, 150);
}

// Draws of the task, of which the mean says more than the one that is shown: per draw and memory, which
// pairs are recalled after the last token.
let draws = [];

function drawNext() {
  const task = makeTask({ ...settings.task, seed: draws.length + 1 }, DATA.sizes);
  draws.push(result.programs.map(program =>
    explore(program, settings.gates, task, DATA.sizes, false).reads[0].map(read => +read.found)));
}

// One at a time, so that what the reader does comes first.
function drawAll() {
  drawNext();
  say();
  if (draws.length < DRAWS) later = setTimeout(drawAll);
}

const share = side => mean(draws.flatMap(draw => draw[side]));

// The token of each pair's last write up to now, 0 before the first.
function written(now) {
  const list = result.task.writes.slice(0, now).map(write => write.pair);
  return result.task.keys.map((_, pair) => list.lastIndexOf(pair) + 1);
}

// Pictures -------------------------------------------------------------------------------------

const color = (element, name) => getComputedStyle(element).getPropertyValue(name).trim();

// Cells by rows: positive numbers in a color, negative ones in that of text, none where nothing is
// known. What is transparent is the page's own background, dark or light.
function paint(canvas, cells, most, element) {
  const [rows, columns] = [cells.length, cells[0].length];
  Object.assign(canvas, { width: columns, height: rows });
  const pen = canvas.getContext("2d");
  const [above, below] = [color(element, "--color"), color(element, "--ink")];
  cells.forEach((row, i) => row.forEach((x, j) => {
    if (x === null || !Number.isFinite(x)) return;
    pen.globalAlpha = Math.min(1, Math.abs(x) / most);
    pen.fillStyle = x < 0 ? below : above;
    pen.fillRect(j, i, 1, 1);
  }));
}

function heatMap(panel, { title, text, label, cells, most, height, width, time, ends }) {
  const canvas = h("canvas", { role: "img", "aria-label": label });
  const map = h("div", { class: "map", style: `height: ${height}px; max-width: ${width ?? "none"}` }, canvas);
  if (time) {
    const columns = cells[0].length;
    map.append(h("i", { style: `left: ${(100 * (at - 1)) / columns}%; width: ${100 / columns}%`, hidden: at === 0 }));
    map.style.cursor = "pointer";
    map.addEventListener("click", event => {
      const box = map.getBoundingClientRect();
      move(1 + Math.floor((columns * (event.clientX - box.left)) / box.width));
    });
  }
  const bar = h("span", {
    class: "bar", style: `background: linear-gradient(90deg, ${ends[0] === "0" ? "transparent" : "var(--ink), transparent"}, var(--color))`,
  });
  panel.append(h("figure", {},
    h("figcaption", {}, h("b", {}, title), h("span", {}, text)), map,
    h("div", { class: "ends", "aria-hidden": true }, h("span", {}, ends[0]), bar, h("span", {}, ends[1]))));
  paint(canvas, cells, most, panel);
}

// Rows and columns of a part of the state, as pictures have them.
function grid(x) {
  return Array.from({ length: x.c }, (_, j) => Array.from({ length: x.r }, (_, i) => x.d[i * x.c + j]));
}

// One number per key channel: of a matrix over keys its diagonal, of one per synapse the mean.
function perKey(part, x) {
  if (part.shape[1] === "K") return Array.from({ length: x.r }, (_, i) => x.d[i * x.c + i]);
  return Array.from({ length: x.r }, (_, i) => mean(x.d.subarray(i * x.c, (i + 1) * x.c)));
}

// What a row of the picture of an importance is, by the shape of that.
const ROWS = {
  K: "a row per key channel",
  1: "one number for all keys",
  "K,V": "a row per key channel, mean over values",
  "K,K": "a row per key channel, the diagonal of the matrix",
};

const largest = cells => Math.max(1e-300, ...cells.flat().filter(x => x !== null && Number.isFinite(x)).map(Math.abs));
const across = rows => rows[0].map((_, i) => rows.map(row => row[i]));

function drawPanel(panel, side) {
  const { runs, programs, rows, tokens, task } = result, run = runs[side], program = programs[side];
  const variant = variants.get(settings.memories[side][0]);
  const title = variant.page ? h("a", { href: variant.page }, variant.title) : variant.title;
  const size = Object.values(run.states[0]).reduce((sum, x) => sum + x.d.length, 0);
  panel.replaceChildren(
    h("h2", {}, title, " ", h("small", {}, program.label)),
    h("p", {}, `${variant.summary}. `, h("span", {}, `${size} numbers of state.`)));
  const times = Array.from({ length: tokens }, (_, t) => t + 1), when = times.map(written);
  const overPairs = of => rows.map(pair => times.map((t, i) => (when[i][pair] ? of(run.reads[t][pair]) : null)));
  const rowHeight = Math.max(11, Math.min(22, 130 / rows.length));
  const height = Math.round(rowHeight * rows.length);
  heatMap(panel, {
    title: "What is recalled",
    text: "a row per pair, the last written below; a column per token; strong is right",
    label: `${variant.title}, ${program.label}: recall of every pair after every token`,
    cells: overPairs(read => read.alike), most: 1, height, time: true, ends: ["wrong", "right"],
  });
  const memory = program.state.find(x => x.name === "memory");
  const entries = grid(run.states[at][memory.symbol]);
  heatMap(panel, {
    title: `State ${memory.symbol}`,
    text: `${memory.meaning}, after token ${at}; keys across, values down`,
    label: `${variant.title}, ${program.label}: the state after token ${at}`,
    cells: entries, most: largest(entries), height: 16 * entries.length, width: `${Math.max(176, 22 * entries[0].length)}px`,
    ends: [round(-largest(entries)), round(largest(entries))],
  });
  const doubts = overPairs(read => read.variance);
  if (program.importance && run.reads[tokens][0].variance !== null) {
    heatMap(panel, {
      title: "Uncertainty of each answer",
      text: "its variance; 1 for a prior of 1 and nothing written",
      label: `${variant.title}, ${program.label}: variance of every answer after every token`,
      cells: doubts, most: largest(doubts), height, time: true, ends: ["0", round(largest(doubts))],
    });
    const part = program.state.find(x => x.name === "importance");
    const cells = across(times.map(t => perKey(part, run.states[t][part.symbol])));
    const [low, high] = [Math.min(0, ...cells.flat().filter(Number.isFinite)), largest(cells)];
    heatMap(panel, {
      title: `Importance ${part.symbol}`,
      text: `${part.meaning}; ${ROWS[part.shape.join()]}`,
      label: `${variant.title}, ${program.label}: importance of every key channel after every token`,
      cells, most: high, height: Math.max(24, Math.min(128, 16 * cells.length)), time: true,
      ends: [low < 0 ? round(low) : "0", round(high)],
    });
  } else {
    const why = program.importance
      ? "Its importance stands for no variance: it does not know how sure it is."
      : "No importance: it is as sure of what it never saw as of what it read a moment ago.";
    panel.append(h("p", { class: "none" }, why));
  }
}

// Recall of every pair that was written, by how many tokens ago that was.
function drawRecall() {
  const width = Math.max(280, recall.clientWidth), height = 250;
  const [left, right, top, bottom] = [44, 14, 12, 40];
  const ages = written(at).map(t => (t ? at - t : null));
  const longest = Math.max(1, result.tokens - 1);
  const shown = result.runs.map(run => result.rows
    .filter(pair => ages[pair] !== null)
    .map(pair => ({ age: ages[pair], ...run.reads[at][pair] }))
    .sort((x, y) => x.age - y.age));
  const low = Math.min(0, ...shown.flat().map(p => Math.floor(4 * p.alike) / 4));
  const x = age => left + ((width - left - right) * (age + 0.5)) / (longest + 1);
  const y = alike => top + ((height - top - bottom) * (1 - alike)) / (1 - low);
  const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spoken() });
  for (let level = low; level <= 1; level += 0.25) {
    drawing.append(
      s("path", { class: "grid", d: `M${left} ${y(level)}H${width - right}` }),
      s("text", { x: left - 8, y: y(level) + 4, "text-anchor": "end" }, level.toFixed(2)));
  }
  const step = Math.ceil(longest / Math.max(4, Math.floor(width / 70)));
  for (let age = 0; age <= longest; age += step) {
    drawing.append(s("text", { x: x(age), y: height - bottom + 18, "text-anchor": "middle" }, String(age)));
  }
  drawing.append(s("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" },
    "tokens since the pair was written"));
  shown.forEach((points, side) => {
    const [hue, shift] = [`var(--${"ab"[side]})`, side ? 3 : -3];
    const place = p => `${x(p.age) + shift} ${y(p.alike)}`;
    drawing.append(s("path", { d: points.map((p, i) => (i ? "L" : "M") + place(p)).join(""), style: `fill: none; stroke: ${hue}`, "stroke-width": 1.5, "stroke-opacity": 0.55 }));
    for (const p of points) {
      const style = `stroke: ${hue}; fill: ${p.found ? hue : "var(--md-default-bg-color, Canvas)"}`;
      const [cx, cy] = [x(p.age) + shift, y(p.alike)];
      const mark = side
        ? s("rect", { x: cx - 4.5, y: cy - 4.5, width: 9, height: 9, style, "stroke-width": 2 })
        : s("circle", { cx, cy, r: 5, style, "stroke-width": 2 });
      mark.append(s("title", {}, `${label(side)}: ${round(p.alike)}, ${p.found ? "recalled" : "another value is nearer"}`));
      drawing.append(mark);
    }
  });
  recall.replaceChildren(drawing);
}

const label = side => `${variants.get(settings.memories[side][0]).title}${result.programs[side].label === "as it is" ? "" : `, ${result.programs[side].label}`}`;

function counts(side) {
  const known = written(at), there = result.rows.filter(pair => known[pair]);
  return [there.filter(pair => result.runs[side].reads[at][pair].found).length, there.length];
}

function spoken() {
  const texts = SIDES.map((_, side) => {
    const [found, all] = counts(side);
    return `${label(side)} recalls ${found} of ${all}`;
  });
  return `After ${at} of ${result.tokens} tokens: ${texts.join("; ")}.`;
}

function say() {
  said.textContent = spoken();
  scores.forEach((score, side) => {
    const [found, all] = counts(side);
    score.now.textContent = `${found} of ${all} in this draw`;
    score.share.textContent = draws.length ? percent(share(side)) : "…";
    score.over.textContent = `recalled, over ${draws.length} draws`;
  });
}

function drawTable() {
  const known = written(at);
  const rows = result.rows.filter(pair => known[pair]).map(pair => h("tr", {},
    h("td", {}, String(at - known[pair])),
    ...result.runs.flatMap(run => {
      const read = run.reads[at][pair];
      return [round(read.alike), read.found ? "yes" : "no", read.variance === null ? "" : round(read.variance)].map(x => h("td", {}, x));
    })));
  table.replaceChildren(
    h("thead", {},
      h("tr", {}, h("th", {}), ...SIDES.map((_, side) => h("th", { colspan: 3, scope: "colgroup" }, label(side)))),
      h("tr", {}, ...["age", ...SIDES.flatMap(() => ["cosine", "recalled", "variance"])].map(x => h("th", { scope: "col" }, x)))),
    h("tbody", {}, ...rows));
}

function draw() {
  moment.value = at;
  clock.textContent = `${at} of ${result.tokens}`;
  moment.setAttribute("aria-valuetext", clock.textContent);
  drawRecall();
  panels.forEach(drawPanel);
  drawTable();
  programs.replaceChildren(...SIDES.map((side, i) => h("div", { class: side },
    h("p", {}, label(i)), h("pre", { tabindex: 0 }, result.programs[i].recurrence.join("\n")))));
  key.replaceChildren(...SIDES.map((side, i) => h("span", { style: `color: var(--${"ab"[i]}); white-space: nowrap` }, `${"●■"[i]} ${label(i)}   `)));
  say();
}

function move(to) {
  at = Math.max(0, Math.min(result.tokens, to));
  draw();
}

function play() {
  const stop = () => {
    clearInterval(timer);
    timer = null;
    player.textContent = "Play";
  };
  if (timer) return stop();
  if (at >= result.tokens) move(0);
  player.textContent = "Pause";
  timer = setInterval(() => {
    move(at + 1);
    if (at >= result.tokens) stop();
  }, 350);
}

// The page -------------------------------------------------------------------------------------

const presets = h("div", { class: "presets", role: "group", "aria-label": "Settings to start from" },
  ...offered.map(preset => h("button", { type: "button", onclick: () => choose(preset) }, preset.title)));
const lesson = h("p", { class: "lesson" });
const player = h("button", { type: "button", onclick: play }, "Play");
const clock = h("output");
const moment = h("input", { type: "range", min: 0, step: 1, id: "gx-moment", oninput: () => move(+moment.value) });
const recall = h("div");
const key = h("span");
const said = h("p", { class: "said", "aria-live": "polite" });
const panels = SIDES.map(side => h("section", { class: `panel ${side}` }));
const programs = h("div", { class: "panels" });
const table = h("table");
// On a telephone the picture comes first, and the sliders when they are asked for.
const roomy = matchMedia("(min-width: 45em)").matches;
const box = (title, open, ...inside) => h("details", { class: "box", open }, h("summary", {}, title), ...inside);
const page = h("div", { class: "gx" },
  presets,
  lesson,
  h("div", { class: "work" },
    h("div", { class: "controls" },
      box("Memories", true, memory(0), memory(1)),
      box("Task", roomy,
        ...Object.entries(TASK).map(([name, x]) => slider("task", name, x)),
        ...Object.entries(CHOICES).map(([name, x]) => choice(name, x)),
        h("p", {}, h("button", {
          type: "button",
          onclick: () => {
            settings.task.seed += 1;
            compute();
          },
        }, "Draw other keys"))),
      box("Gates, equal at every token", roomy,
        ...Object.entries(GATES).map(([name, x]) => slider("gates", name, x)))),
    h("div", { class: "seen" },
      h("figure", {},
        h("figcaption", {}, h("b", {}, "Recall of every pair, by age"),
          h("span", {}, "cosine of the answer and the value; hollow: another stored value is nearer. "), key),
        recall),
      said,
      h("div", { class: "time" }, player,
        h("label", { for: moment.id }, h("span", { class: "name" }, "Token", clock), moment)),
      h("div", { class: "panels" }, ...panels))),
  h("details", {}, h("summary", {}, "The recurrences that run here"), programs),
  h("details", {}, h("summary", {}, "The numbers of the first picture"), h("div", { class: "wide", tabindex: 0 }, table)));
document.head.append(h("style", {}, STYLE));
root.replaceChildren(page);

// The documentation has a switch of its own; elsewhere the system says whether it is dark.
const dark = matchMedia("(prefers-color-scheme: dark)");
function shade() {
  const scheme = document.body.dataset.mdColorScheme;
  page.classList.toggle("night", scheme ? scheme === "slate" : dark.matches);
  if (result) draw();
}
dark.addEventListener("change", shade);
new MutationObserver(shade).observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme"] });
new ResizeObserver(() => result && drawRecall()).observe(recall);
shade();
choose(offered[0] ?? null);
// The address may name a variant: explore.html?memory=kda
const named = variants.get(new URLSearchParams(location.search).get("memory"));
if (named) {
  settings.memories = usual(named);
  fillControls();
  changed();
}

// For tests: what was computed, and with what.
globalThis.glazooExplore = {
  data: DATA, settings, choose, compute, makeTask, explore, Memory, Recurrence, matrix,
  presets: offered,
  result: () => result,
  shares() {
    while (draws.length < DRAWS) drawNext();
    return SIDES.map((_, side) => share(side));
  },
};
