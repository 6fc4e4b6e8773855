// The page: a task, one or two panes that run it, the keys of the keyboard.

import { EXAMPLES } from "./examples.js";
import { Pane } from "./pane.js";
import { getJson } from "./stream.js";
import { Task } from "./task.js";

const THEMES = ["auto", "light", "dark"];
const RETRY_MS = 2000;
const $ = (id) => document.getElementById(id);

const announce = (words) => ($("announcer").textContent = words);
const getKey = () => $("key").value; // the only place where it is kept
const task = new Task($("task"), announce);
const panes = [new Pane("A", { task, getKey, announce }), new Pane("B", { task, getKey, announce })];
const shown = () => (isComparing() ? panes : panes.slice(0, 1));
const isComparing = () => $("compare").getAttribute("aria-pressed") === "true";

function refresh() {
  for (const pane of panes) pane.refresh();
  task.show(shown().map((pane) => pane.mode));
}

async function run() {
  const running = shown();
  announce("Running");
  $("stop").disabled = false;
  panes[0].show();
  await Promise.all(running.map((pane) => pane.run()));
  if (panes.some((pane) => pane.running)) return; // it was run again meanwhile
  if (document.activeElement === $("stop")) $("run").focus();
  $("stop").disabled = true;
}

function stop() {
  for (const pane of panes) pane.stop();
}

function compare() {
  const on = !isComparing();
  $("compare").setAttribute("aria-pressed", String(on));
  $("panes").classList.toggle("two", on);
  panes[1].root.hidden = !on;
  if (on) {
    panes[1].set(panes[0].settings());
    panes[1].mode = panes[0].mode === "cot" ? "instruction" : "cot";
  } else panes[1].close();
  announce(on ? "Two panes run the same task." : "One pane.");
  refresh();
}

async function describeModel() {
  const model = $("model");
  const say = (state, words) => {
    model.dataset.state = state;
    $("model-text").textContent = words;
  };
  try {
    const [card] = (await getJson("v1/models", getKey())).data;
    say("ready", `${card.id} · ${card.runtime} · ${card.dtype} · ${card.max_input_tokens} tokens in, ${card.max_output_tokens} out`);
    for (const pane of panes) pane.find(".max-tokens-range").textContent = `1 – ${card.max_output_tokens}`;
  } catch (error) {
    if (error.code === "unauthorized") {
      $("reference").hidden = true; // a link cannot send the key
      $("key").placeholder = "needed";
      return say("closed", getKey() ? "The key is not valid" : "This server needs a key");
    }
    say("loading", error.code ? "Not ready yet" : "The server cannot be reached");
    setTimeout(describeModel, RETRY_MS);
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

function offerExamples() {
  for (const example of EXAMPLES) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "chip", textContent: example.name });
    button.addEventListener("click", () => {
      load(example);
      announce(`${example.name} is filled in.`);
    });
    document.querySelector(".examples").append(button);
  }
}

function load(example) {
  task.fill(example);
  panes[0].set(example.settings ?? {});
  panes[0].mode = example.mode;
  refresh();
}

$("panes").append(...panes.map((pane) => pane.root));
panes[1].root.hidden = true;
offerExamples();
load(EXAMPLES[0]);
describeModel();
setTheme("auto");

document.addEventListener("input", refresh);
$("task").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", stop);
$("compare").addEventListener("click", compare);
$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", describeModel);
$("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  setTheme(next);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") stop();
});
