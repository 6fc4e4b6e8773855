// One pane: its mode and settings, its run, what came of it, and the same request as code.

import { Output } from "./output.js";
import * as snippets from "./snippets.js";
import { Meter, RequestError, generate } from "./stream.js";

const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "min_tokens", "seed"];
const LIVE_MS = 100;

const ms = (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`);
const speed = (value) => `${value < 100 ? value.toFixed(1) : Math.round(value)} tok/s`;

export class Pane {
  constructor(letter, { task, getKey, announce }) {
    this.letter = letter;
    this.task = task;
    this.getKey = getKey;
    this.announce = announce;
    this.newest = null; // the AbortController of the newest run
    this.running = false;
    this.root = document.getElementById("pane-template").content.firstElementChild.cloneNode(true);
    this.output = new Output(this.find(".output"));
    this.errorBox = this.find(".error"); // it moves to the field at fault, so it is not always in the pane
    this.#label();
    this.root.addEventListener("input", (event) => this.#changed(event.target));
    this.find(".copy").addEventListener("click", () => this.#copy());
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  get mode() {
    return this.find(".modes input:checked").value;
  }

  set mode(mode) {
    this.find(`.modes input[value=${mode}]`).checked = true;
    this.refresh();
  }

  // The settings that are said, by name; those of other modes are kept but not sent.
  settings() {
    const said = {};
    for (const name of [...NUMBERS, this.mode === "cot" ? "samples" : "n"]) {
      const { value } = this.find(`[name=${name}]`);
      if (value !== "") said[name] = Number(value);
    }
    const stop = this.find("[name=stop]").value.split("\n").filter(Boolean);
    if (stop.length) said.stop = stop;
    if (this.mode === "cot" && this.find("[name=answer_format]").value !== "text") said.answer_format = "number";
    if (this.find("[name=debug]").checked) said.debug = true;
    return said;
  }

  set(settings) {
    for (const input of this.root.querySelectorAll(".settings [name]")) {
      if (input.type === "checkbox") input.checked = settings[input.name] ?? false;
      else if (input.tagName === "SELECT") input.value = settings[input.name] ?? "text";
      else input.value = Array.isArray(settings[input.name]) ? settings[input.name].join("\n") : (settings[input.name] ?? "");
      this.#moveTwin(input);
    }
    this.refresh();
  }

  body() {
    return { ...this.task.fields(this.mode), ...this.settings(), stream: true };
  }

  // Everything that shows the request follows its fields.
  refresh() {
    for (const field of this.root.querySelectorAll("[data-only-in]")) field.hidden = field.dataset.onlyIn !== this.mode;
    for (const field of this.root.querySelectorAll(".settings [data-not-in]")) field.hidden = field.dataset.notIn === this.mode;
    const { temperature, seed, max_tokens: most, samples, n, ...others } = this.settings();
    const words = [temperature > 0 ? `temperature ${temperature}` : samples > 1 ? "sampled" : "greedy"];
    if (seed !== undefined) words.push(`seed ${seed}`);
    if (most !== undefined) words.push(`max ${most} tokens`);
    if (samples > 1) words.push(`${samples} samples`);
    if (n > 1) words.push(`${n} outputs`);
    words.push(...Object.keys(others).map((name) => name.replaceAll("_", " ")));
    this.find(".settings-now").textContent = words.join(" · ");
    const language = this.find(".code .modes input:checked").value;
    this.find("pre").textContent = snippets[language](this.body(), this.getKey() !== "");
  }

  async run() {
    this.stop();
    this.#clear();
    const controller = (this.newest = new AbortController());
    this.running = true;
    const body = this.body();
    const meter = (this.meter = new Meter());
    const ticking = setInterval(() => this.#showLive(meter), LIVE_MS);
    this.output.begin(body.mode, body.samples ?? body.n ?? 1);
    this.find(".output").setAttribute("aria-busy", "true");
    this.#stat("finish", "running");
    const finishes = [];
    try {
      let last = null;
      const onOpen = (id) => (this.requestId = id);
      for await (const frame of generate(body, { key: this.getKey(), signal: controller.signal, onOpen })) {
        if (frame.usage) last = frame;
        else {
          if (frame.text) meter.piece();
          this.output.add(frame.index, frame.text);
          if (frame.finish_reason) finishes[frame.index] = frame.stop_reason ? `stop “${frame.stop_reason}”` : frame.finish_reason;
        }
      }
      meter.stop();
      this.#showWhole(last, body, finishes);
    } catch (error) {
      meter.stop();
      if (this.newest === controller) this.#fail(error, controller.signal.aborted);
    } finally {
      clearInterval(ticking);
      if (this.newest === controller) {
        this.running = false;
        this.find(".output").removeAttribute("aria-busy");
      }
    }
  }

  stop() {
    this.newest?.abort();
  }

  close() {
    this.stop();
    this.#clear();
  }

  // Where the pane stands below the task (a narrow window) a run comes into view: its head, or what follows open settings.
  show() {
    const isBelow = this.root.getBoundingClientRect().top >= this.task.form.getBoundingClientRect().bottom;
    const isLow = this.find(".stats").getBoundingClientRect().bottom > window.innerHeight * 0.4;
    const start = this.find(".settings").open ? this.find(".stats") : this.root;
    if (isBelow && isLow) start.scrollIntoView({ block: "start" });
  }

  #label() {
    const name = `Pane ${this.letter}`;
    this.root.setAttribute("aria-label", name);
    this.find("h2").textContent = this.letter;
    this.find("h2").setAttribute("aria-label", name);
    this.find("pre").setAttribute("aria-label", `Request of ${name} as code`);
    this.root.querySelectorAll(".pane-head input").forEach((input) => (input.name = `mode-${this.letter}`));
    this.root.querySelectorAll(".code .modes input").forEach((input) => (input.name = `language-${this.letter}`));
    for (const label of this.root.querySelectorAll("[data-for]")) {
      const input = this.find(`[name=${label.dataset.for}]`);
      label.htmlFor = input.id = `${label.dataset.for}-${this.letter}`;
      const words = label.firstChild.textContent.trim();
      this.find(`[data-twin=${input.name}]`)?.setAttribute("aria-label", `${words}, slider`);
    }
    this.errorBox.id = `error-${this.letter}`;
  }

  #changed(input) {
    if (input.dataset.twin) this.find(`[name=${input.dataset.twin}]`).value = input.value;
    else this.#moveTwin(input);
    input.removeAttribute("aria-invalid");
    this.refresh();
  }

  #moveTwin(input) {
    const twin = this.find(`[data-twin="${input.name}"]`);
    if (twin) twin.value = input.value === "" ? input.placeholder : input.value;
  }

  #clear() {
    this.requestId = null;
    for (const name of ["ttft", "rate", "in", "out", "exemplars"]) this.#stat(name, "–");
    this.errorBox.hidden = this.find(".notes").hidden = this.find(".served").hidden = true;
    this.find(".stats").after(this.errorBox);
    for (const input of document.querySelectorAll(`[aria-describedby~="error-${this.letter}"]`)) {
      input.removeAttribute("aria-invalid");
      const others = input.getAttribute("aria-describedby").split(" ").filter((id) => id !== `error-${this.letter}`);
      if (others.length) input.setAttribute("aria-describedby", others.join(" "));
      else input.removeAttribute("aria-describedby");
    }
  }

  #stat(name, text) {
    this.find(`[data-stat=${name}]`).textContent = text;
  }

  #showLive(meter) {
    this.#stat("ttft", meter.ttft === null ? `${ms(performance.now() - meter.began)} …` : ms(meter.ttft));
    if (meter.rate !== null) this.#stat("rate", speed(meter.rate));
    if (meter.pieces > 0) this.#stat("out", `~${meter.pieces}`);
  }

  #showWhole(frame, body, finishes) {
    this.#showLive(this.meter);
    this.output.end(frame);
    const { usage, timings } = frame;
    const making = timings.total_ms - timings.first_token_ms; // in which all but each output's first token came
    const rest = usage.completion_tokens - finishes.length;
    this.#stat("rate", rest > 0 && making > 0 ? speed((1000 * rest) / making) : "–");
    this.#stat("in", usage.prompt_tokens);
    this.#stat("out", usage.completion_tokens);
    const shown = frame.exemplars_used + frame.exemplars_dropped;
    this.#stat("exemplars", shown ? `${frame.exemplars_used} of ${shown}` : "none");
    this.#stat("finish", [...new Set(finishes)].join(", "));
    this.#note(frame, body);
    const served = this.find(".served");
    served.hidden = false;
    const id = Object.assign(document.createElement("span"), { textContent: frame.request_id });
    const times = `queue ${ms(timings.queue_ms)}, first token ${ms(timings.first_token_ms ?? 0)}, whole ${ms(timings.total_ms)}`;
    served.replaceChildren(`Server: ${times} · `, id);
    const answer = frame.answer ?? this.output.texts[0].textContent;
    this.announce(`Pane ${this.letter}: ${answer}. ${usage.completion_tokens} tokens.`);
  }

  #note(frame, body) {
    const notes = [];
    const { unknown_tokens: unknown } = frame.usage;
    if (frame.exemplars_dropped) notes.push(`${frame.exemplars_dropped} exemplars were dropped: the prompt would have been too long.`);
    if (unknown) notes.push(`${unknown} tokens of the prompt are unknown to the model's vocabulary.`);
    if (body.max_tokens > frame.max_tokens) notes.push(`Max tokens was lowered to ${frame.max_tokens}, the server's limit.`);
    const list = this.find(".notes");
    list.hidden = notes.length === 0;
    list.replaceChildren(...notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
  }

  #fail(error, wasStopped) {
    this.#showLive(this.meter);
    if (this.meter.ttft === null) this.#stat("ttft", "–");
    if (wasStopped) {
      this.#stat("finish", "stopped");
      if (this.output.isEmpty) this.output.add(0, "Stopped before the first token.");
      this.announce(`Pane ${this.letter}: stopped.`);
      return;
    }
    this.#stat("finish", "error");
    const field = error.code === "unauthorized" ? document.getElementById("key") : error.field ? this.#fieldOf(error.field) : null;
    const label = field?.labels?.[0]?.firstChild.textContent.trim();
    const message = error instanceof RequestError ? error.message : "The server cannot be reached.";
    const box = this.errorBox;
    box.hidden = false;
    box.replaceChildren();
    if (label) box.append(Object.assign(document.createElement("strong"), { textContent: `${label}: ` }));
    box.append(message);
    if (this.output.isEmpty) this.output.root.replaceChildren();
    if (field) this.#pointAt(field);
  }

  #fieldOf(name) {
    return this.find(`.settings [name="${name}"]`) ?? this.task.form.elements[name === "exemplars" ? "exemplar-0-output" : name] ?? null;
  }

  #pointAt(field) {
    field.setAttribute("aria-invalid", "true");
    const described = [field.getAttribute("aria-describedby"), `error-${this.letter}`].filter(Boolean).join(" ");
    field.setAttribute("aria-describedby", described);
    const details = field.closest("details");
    if (details) details.open = true;
    field.closest(".field")?.after(this.errorBox);
    field.focus();
  }

  async #copy() {
    const pre = this.find("pre");
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      // Pages that came over plain HTTP from another machine have no clipboard but this one.
      window.getSelection().selectAllChildren(pre);
      document.execCommand("copy");
    }
    this.find(".copy").textContent = "Copied";
    this.announce("Copied");
    setTimeout(() => (this.find(".copy").textContent = "Copy"), 1500);
  }
}
