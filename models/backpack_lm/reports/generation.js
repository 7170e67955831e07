const TOKENS = [...DATA.prompt, ...DATA.steps.map((step) => step.token)];
const FIRST = DATA.prompt.length, ROWS = 12;
const text = document.getElementById("text"), detail = document.getElementById("detail");
const map = document.getElementById("map"), hint = document.getElementById("hint");
const style = getComputedStyle(document.documentElement);
const shade = (value, most) => {
  const colour = style.getPropertyValue(value < 0 ? "--shade-against" : "--shade").trim();
  return `rgba(${colour}, ${Math.min(0.85, 0.85 * Math.abs(value) / (most || 1)).toFixed(3)})`;
};
const shown = (token) => JSON.stringify(token).slice(1, -1).replace(/ /g, "·");
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
let chosen = 0, cell = { width: 0, height: 0, left: 0 };

const spans = TOKENS.map((token, at) => {
  const span = document.createElement("span");
  span.textContent = token;
  if (at >= FIRST) {
    span.className = "made";
    span.tabIndex = 0;
    span.addEventListener("mouseenter", () => choose(at - FIRST));
    span.addEventListener("focus", () => choose(at - FIRST));
  }
  text.append(span);
  return span;
});

function cellOf(tag, content, className = "") {
  const element = document.createElement(tag);
  element.className = className;
  if (content instanceof Node) element.append(content); else element.textContent = content;
  return element;
}

function row(table, parts, className = "") {
  const line = document.createElement("tr");
  line.className = className;
  line.append(...parts);
  table.append(line);
}

function choose(number) {
  chosen = number;
  const step = DATA.steps[number], own = FIRST + number;
  const gave = new Array(own).fill(0);
  for (const term of step.terms) gave[term.position] += term.contribution;
  const most = Math.max(...gave.map(Math.abs));
  spans.forEach((span, at) => {
    span.classList.toggle("chosen", at === own);
    span.classList.toggle("later", at > own);
    span.style.background = at < own ? shade(gave[at], most) : "";
    span.title = at < own ? signed(gave[at]) : "";
  });
  const head = cellOf("h2", "");
  head.append(cellOf("span", shown(step.token), "token"));
  const facts = document.createElement("dl");
  for (const [name, value] of [["probability", (100 * step.probability).toFixed(2) + " %"], ["logit", signed(step.logit)]]) {
    const pair = document.createElement("div");
    pair.append(cellOf("dt", name), cellOf("dd", value));
    facts.append(pair);
  }
  const table = document.createElement("table");
  row(table, ["word", "at", "sense", "α", "× topic", "gives", ""].map(
    (name, at) => cellOf("th", name, at >= 1 && at <= 5 ? "number" : "")));
  const top = step.terms.slice(0, ROWS), largest = Math.abs(top.length ? top[0].contribution : 1) || 1;
  let listed = 0;
  for (const term of top) {
    listed += term.contribution;
    const bar = cellOf("span", "", term.contribution < 0 ? "bar minus" : "bar");
    bar.style.width = `${(100 * Math.abs(term.contribution) / largest).toFixed(1)}%`;
    row(table, [
      cellOf("td", shown(TOKENS[term.position]), "token"), cellOf("td", term.position, "number"),
      cellOf("td", term.sense, "number"), cellOf("td", term.weight.toFixed(3), "number"),
      cellOf("td", term.multiplier.toFixed(2), "number"), cellOf("td", signed(term.contribution), "number"),
      cellOf("td", bar, "meter"),
    ]);
  }
  const end = (name, value, className) => {
    const label = cellOf("td", name);
    label.colSpan = 5;
    row(table, [label, cellOf("td", signed(value), "number"), cellOf("td", "")], className);
  };
  end("all other terms", step.logit - step.bias - listed, "rest");
  if (step.bias) end("release's bias on this word", step.bias, "rest");
  end("the logit", step.logit, "sum");
  detail.replaceChildren(head, facts, table);
  draw(step, own);
}

function draw(step, own) {
  const ratio = window.devicePixelRatio || 1, wide = map.parentElement.clientWidth;
  const height = 17, left = 26, width = Math.max(5, Math.min(34, (wide - left) / own));
  cell = { width, height, left };
  map.width = (left + width * own) * ratio;
  map.height = (height * DATA.senses + 4) * ratio;
  map.style.width = `${left + width * own}px`;
  map.style.height = `${height * DATA.senses + 4}px`;
  const paint = map.getContext("2d");
  paint.scale(ratio, ratio);
  paint.font = "11px ui-sans-serif, system-ui, sans-serif";
  paint.fillStyle = style.getPropertyValue("--soft");
  for (let sense = 0; sense < DATA.senses; sense++) paint.fillText(String(sense), 4, sense * height + 12);
  paint.fillStyle = style.getPropertyValue("--line");
  paint.globalAlpha = 0.35;
  paint.fillRect(left, 0, width * own, height * DATA.senses);
  paint.globalAlpha = 1;
  const most = Math.max(...step.terms.map((term) => Math.abs(term.contribution)));
  for (const term of step.terms) {
    paint.fillStyle = shade(term.contribution, most);
    paint.fillRect(left + term.position * width, term.sense * height, width - 1, height - 1);
  }
  hint.textContent = "Rows are senses, columns the words before. Point at a field.";
}

map.addEventListener("mousemove", (event) => {
  const box = map.getBoundingClientRect(), step = DATA.steps[chosen];
  const position = Math.floor((event.clientX - box.left - cell.left) / cell.width);
  const sense = Math.floor((event.clientY - box.top) / cell.height);
  const term = step.terms.find((one) => one.position === position && one.sense === sense);
  if (term) hint.textContent =
    `sense ${sense} of ${shown(TOKENS[position])}: α ${term.weight.toFixed(3)}, gives ${signed(term.contribution)}`;
});

document.addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(DATA.steps.length - 1, chosen + by)));
});
window.addEventListener("resize", () => choose(chosen));
if (DATA.steps.length) choose(0);
