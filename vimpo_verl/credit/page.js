"use strict";
// Shows the data block of this file. Text of models goes through textContent only. A prompt is drawn when it is opened.
const data = JSON.parse(document.getElementById("data").textContent);
const readout = document.getElementById("readout");
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 120, LEFT = 26, TOP = 14, BOTTOM = 16;
const GAP = 11;      // between a curve's end and its labels
const POINTS = 500;  // of a curve; a longer one keeps the extremes of each part
const FULL = 0.75;   // opacity of the strongest colour: text stays readable on it
// Marks that turn the direction of text around, some of them up to the end of the paragraph, and show nothing themselves.
const MARKS = {
  "\u061c": "ALM", "\u200e": "LRM", "\u200f": "RLM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO",
  "\u202e": "RLO", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI",
};
const MARK = new RegExp(`([${Object.keys(MARKS).join("")}])`);
let quantity = "td", withRewards = false, held = null;

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const drawn = (tag, attributes, text) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const signed = (x, digits = 3) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const precise = (x) => (x === 0 ? "0" : (x < 0 ? "−" : "+") + Math.abs(x).toPrecision(3));
const small = (x) => (Math.abs(x) < 0.01 ? precise(x) : signed(x));

// Text as it is, each mark isolated and with its name: what is after it keeps its direction.
function shown(text) {
  return text.split(MARK).map((part) => {
    if (!(part in MARKS)) return part;
    const mark = element("bdi", "mark", part);
    mark.dataset.mark = MARKS[part];
    return mark;
  });
}
// In one line, with escapes for whatever cannot be seen.
const escaped = (text) => JSON.stringify(text).replace(
  /[\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => [...Array(c.length).keys()].map((i) => "\\u" + c.charCodeAt(i).toString(16).padStart(4, "0")).join(""),
);

// ---- tokens ----

// The value is coloured by how far it has come from V0: V(s_t) + S = sum of td before t.
const colourOf = (answer, t) => answer.tokens[quantity][t] + (quantity === "value" ? answer.judgement : 0);

function background(x) {
  const limit = data.limits[quantity];
  const strength = limit > 0 ? Math.min(Math.abs(x) / limit, 1) * FULL : 0;
  return `rgba(var(--${x >= 0 ? "up" : "down"}), ${strength.toFixed(3)})`;
}

function tokenElement(answer, t) {
  const tokens = answer.tokens, text = tokens.text[t], made = element("span");
  made.dataset.t = t;
  made.tabIndex = t === 0 ? 0 : -1;  // Tab comes to one token of an answer, arrow keys to the others
  if (tokens.special?.[t]) made.className = "special";
  if (tokens.mask && !tokens.mask[t]) made.classList.add("foreign");
  if (text === "") made.append(element("i", "glyph", "·"));  // a part of the character that a later token completes
  else {
    // A line break is visible, and still breaks the line.
    text.split("\n").forEach((line, i) => {
      if (i > 0) made.append(element("i", "glyph", "↵"), "\n");
      made.append(...shown(line));
    });
  }
  return made;
}

function paint(box) {
  const answer = box.answer;
  for (const span of box.querySelectorAll(".tokens span")) {
    span.style.background = background(colourOf(answer, +span.dataset.t));
  }
}

// ---- the curve ----

// V0 + sum of td before each token, and at the end; null at tokens that the policy did not write.
function curveOf(answer) {
  const end = answer.baseline + answer.judgement, {value, mask} = answer.tokens;
  return [...value.map((v, t) => (mask && !mask[t] ? null : v + end)), end];
}

function thinned(curve) {
  const points = [];
  const part = Math.max(1, Math.ceil(curve.length / POINTS));
  for (let from = 0; from < curve.length; from += part) {
    let low = -1, high = -1;
    for (let t = from; t < Math.min(from + part, curve.length); t++) {
      if (curve[t] === null) continue;
      if (low < 0 || curve[t] < curve[low]) low = t;
      if (high < 0 || curve[t] > curve[high]) high = t;
    }
    if (low >= 0) points.push(...new Set([Math.min(low, high), Math.max(low, high)]));
  }
  const last = curve.length - 1;
  if (points[points.length - 1] !== last) points.push(last);
  return points;
}

// What stands at the end of a curve: place and text of R and S.
function labelsOf(answer, [low, high]) {
  const off = answer.reward > high ? "↑ " : answer.reward < low ? "↓ " : "";
  return [`${off}R ${+answer.reward.toPrecision(3)}`, `S ${small(answer.judgement)}`];
}
const pen = document.createElement("canvas").getContext("2d");
function widthOf(text) {
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

// R is off the scale while values are small beside rewards: then its place is the edge, with an arrow.
function plot(answer, [low, high], width, margin) {
  const curve = curveOf(answer), last = curve.length - 1;
  const x = (t) => LEFT + (t / last) * (width - LEFT - margin);
  const y = (v) => TOP + ((high - Math.min(Math.max(v, low), high)) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const off = answer.reward > high || answer.reward < low;
  const end = answer.baseline + answer.judgement, right = width - margin;
  const label = `value from V0 ${answer.baseline.toFixed(3)} to ${end.toFixed(3)}, reward ${answer.reward}`;
  const made = drawn("svg", {viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label});
  const level = (v) => ({x1: LEFT, x2: right, y1: y(v), y2: y(v)});
  const points = thinned(curve).map((t) => `${x(t).toFixed(1)},${y(curve[t]).toFixed(1)}`);
  made.append(
    drawn("line", {class: "start", ...level(answer.baseline)}),
    drawn("line", {class: off ? "reward off" : "reward", ...level(answer.reward)}),
    drawn("line", {class: "gap", x1: right + 5, x2: right + 5, y1: y(end), y2: y(answer.reward)}),
    drawn("path", {class: "curve", d: "M" + points.join("L")}),
    drawn("circle", {class: "end", cx: right, cy: y(end), r: 3.5}),
    drawn("text", {x: LEFT - 5, y: y(answer.baseline) + 4, "text-anchor": "end"}, "V0"),
    drawn("text", {x: LEFT, y: HEIGHT - 3}, "token 1"),
    drawn("text", {x: right, y: HEIGHT - 3, "text-anchor": "end"}, String(last)),
  );
  // The labels at the end keep apart, whatever the numbers are.
  const [reward, judgement] = labelsOf(answer, [low, high]);
  const labels = [[y(answer.reward), reward], [y(end), judgement]];
  const apart = 13, upper = labels[0][0] <= labels[1][0] ? 0 : 1;
  const overlap = apart - (labels[1 - upper][0] - labels[upper][0]);
  if (overlap > 0) { labels[upper][0] -= overlap / 2; labels[1 - upper][0] += overlap / 2; }
  for (const [at, text] of labels) made.append(drawn("text", {x: right + GAP, y: at + 4}, text));
  const cursor = drawn("line", {class: "cursor", x1: 0, x2: 0, y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  made.append(cursor);
  made.showAt = (t) => {
    cursor.setAttribute("visibility", t === null ? "hidden" : "visible");
    if (t !== null) { cursor.setAttribute("x1", x(t)); cursor.setAttribute("x2", x(t)); }
  };
  return made;
}

// ---- what is pointed at ----

function show(box, t) {
  const answer = box.answer, tokens = answer.tokens, at = (name) => tokens[name][t];
  const fields = [
    ["token", `${t + 1} of ${tokens.id.length}`], ["id", at("id")], ["log π", precise(at("log_prob"))],
    ["log π_ref", precise(at("ref_log_prob"))], ["KL", at("kl").toPrecision(3)],
    ["td", precise(at("td"))], ["V(s_t)", precise(at("value"))], ["from V0", precise(at("value") + answer.judgement)],
    ["A", precise(at("advantage"))],
  ];
  const text = at("text") === "" ? "part of a character" : escaped(at("text"));
  readout.replaceChildren(element("code", "", text), ...fields.map(([name, value]) => {
    const field = element("span", "", `${name} `);
    field.append(element("b", "", value));
    return field;
  }));
  box.plot.showAt(t);
  for (const other of document.querySelectorAll(".at")) other.classList.remove("at");
  const span = box.querySelector(`[data-t="${t}"]`);
  span.classList.add("at");
  return span;
}

function hold(box, t) {
  if (held && held.box !== box) release();
  held = {box, t};
  for (const stop of box.querySelectorAll('.tokens [tabindex="0"]')) stop.tabIndex = -1;
  show(box, t).tabIndex = 0;
}
function release() {
  held?.box.plot.showAt(null);
  held = null;
}

document.addEventListener("pointerover", (event) => {
  const span = event.target.closest?.(".tokens span");
  if (span && !held) show(span.closest(".answer"), +span.dataset.t);
  else if (!span && !held) for (const box of document.querySelectorAll(".answer")) box.plot.showAt(null);
});
document.addEventListener("focusin", (event) => {
  const span = event.target.closest?.(".tokens span");
  if (span) hold(span.closest(".answer"), +span.dataset.t);
});
document.addEventListener("click", (event) => {
  if (!event.target.closest?.("nav, header, summary, .tokens span")) release();
});
document.addEventListener("keydown", (event) => {
  const span = event.target.closest?.(".tokens span");
  if (!span || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") { span.blur(); release(); return; }
  const t = +span.dataset.t, last = span.closest(".answer").answer.tokens.id.length - 1;
  const to = {ArrowLeft: t - 1, ArrowRight: t + 1, Home: 0, End: last}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = span.closest(".tokens").querySelector(`[data-t="${Math.min(Math.max(to, 0), last)}"]`);
  next.focus({preventScroll: true});
  next.scrollIntoView({block: "nearest"});
});

// ---- prompts ----

function answerElement(answer, number) {
  const box = element("article", "answer");
  box.answer = answer;
  box.plot = drawn("svg", {});
  const numbers = element("p", "numbers");
  for (const [name, value] of [
    ["answer", number], ["R", +answer.reward.toPrecision(4)], ["V0", answer.baseline.toFixed(3)],
    ["S", small(answer.judgement)], ["residual", small(answer.residual)], ["tokens", answer.tokens.id.length], ["times", answer.times],
  ]) {
    if (name === "times" && value === 1) continue;
    const field = element("span", "", `${name} `);
    field.append(element("b", "", value));
    numbers.append(field);
  }
  numbers.title = answer.where;
  const text = element("div", "tokens");
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `tokens of answer ${number}; arrow keys, Home and End walk`);
  text.append(...answer.tokens.id.map((_, t) => tokenElement(answer, t)));
  box.append(numbers, box.plot, text);
  paint(box);
  return box;
}

function sidesOf(prompt) {
  const rewards = prompt.answers.map((answer) => answer.reward);
  const binary = rewards.every((reward) => reward === 0 || reward === 1);
  const best = Math.max(...rewards), middle = (best + Math.min(...rewards)) / 2;
  const good = (answer) => (binary ? answer.reward === 1 : answer.reward > middle || best === middle);
  const numbered = prompt.answers.map((answer, i) => ({answer, number: i + 1}));
  return [
    {title: binary ? "Right" : "Higher rewards", members: numbered.filter(({answer}) => good(answer))},
    {title: binary ? "Wrong" : "Lower rewards", members: numbered.filter(({answer}) => !good(answer))},
  ].filter((side) => side.members.length > 0);
}

// Of the curves of all answers to a prompt, so that they can be compared; with the rewards if asked.
function rangeOf(prompt) {
  const levels = prompt.answers.flatMap((answer) => curveOf(answer).filter((v) => v !== null));
  if (withRewards) levels.push(...prompt.answers.flatMap((answer) => [answer.reward, answer.baseline]));
  const low = levels.reduce((a, b) => Math.min(a, b)), high = levels.reduce((a, b) => Math.max(a, b));
  const margin = 0.06 * (high - low) || 0.5;
  return [low - margin, high + margin];
}

function fill(section, prompt) {
  const body = element("div", "body");
  const question = element("div", "question");
  question.append(...shown(prompt.text));
  body.append(question);
  const sides = sidesOf(prompt), grid = element("div", sides.length > 1 ? "sides" : "sides one");
  for (const {title, members} of sides) {
    const column = element("section");
    column.append(element("h3", "", `${title}`));
    column.append(...members.map(({answer, number}) => answerElement(answer, number)));
    grid.append(column);
  }
  body.append(grid);
  section.append(body);
  drawCurves(section, prompt);
}

// In pixels of the place there is, so that letters keep their size.
function drawCurves(section, prompt) {
  const range = rangeOf(prompt);
  const margin = GAP + 3 + Math.ceil(Math.max(...prompt.answers.flatMap((answer) => labelsOf(answer, range)).map(widthOf)));
  for (const box of section.open ? section.querySelectorAll(".answer") : []) {
    const made = plot(box.answer, range, Math.max(box.plot.clientWidth, LEFT + margin + 60), margin);
    box.plot.replaceWith(made);
    box.plot = made;
  }
}
const drawAll = () => sections.forEach((section, i) => drawCurves(section, data.prompts[i]));

const sections = data.prompts.map((prompt, i) => {
  const section = element("details", "prompt"), head = element("summary");
  const text = element("code");
  text.append(...shown(prompt.text.replace(/\s+/g, " ")));
  head.append(element("b", "", `Prompt ${i + 1}`), text,
    element("em", "", `V0 ${prompt.baseline.toFixed(3)}, ${prompt.answers.length} answers`));
  section.append(head);
  section.addEventListener("toggle", () => {
    if (!section.querySelector(".body")) fill(section, prompt);
    else drawCurves(section, prompt);
  });
  document.getElementById("prompts").append(section);
  section.open = i === 0;
  return section;
});
addEventListener("resize", drawAll);

const rewards = document.getElementById("rewards");
rewards.addEventListener("change", () => { withRewards = rewards.checked; drawAll(); });

function choose(name) {
  quantity = name;
  const limit = data.limits[name];
  document.getElementById("low").textContent = precise(-limit);
  document.getElementById("high").textContent = precise(limit);
  document.getElementById("meaning").textContent = data.explanation[name];
  for (const box of document.querySelectorAll(".answer")) paint(box);
}
// credit.html#value and #advantage,rewards open the page that way.
const asked = location.hash.slice(1).split(",");
for (const radio of document.querySelectorAll("[name=quantity]")) {
  radio.addEventListener("change", () => choose(radio.value));
  if (asked.includes(radio.value)) radio.checked = true;
}
withRewards = rewards.checked = asked.includes("rewards");
choose(document.querySelector("[name=quantity]:checked").value);
drawAll();
