// The task that all panes share: instruction, input, options, exemplars.

const SEPARATE = ["instruction", "input", "options"];

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

export class Task {
  constructor(form, announce) {
    this.form = form;
    this.announce = announce;
    this.list = form.querySelector("#exemplars");
    this.count = form.querySelector("#exemplar-count");
    form.querySelector("#add-exemplar").addEventListener("click", () => this.add({}, { focus: true }));
    this.list.addEventListener("click", (event) => this.#act(event.target));
  }

  // The request fields of a mode; those that it does not take are left out.
  fields(mode) {
    const { instruction, input, options, exemplar_set: set, num_exemplars: first } = this.form.elements;
    const body = { mode, instruction: instruction.value };
    if (mode === "raw") return body;
    if (input.value.trim()) body.input = input.value;
    if (lines(options.value).length) body.options = lines(options.value);
    if (mode === "instruction") return body;
    const exemplars = this.exemplars();
    if (exemplars.length) body.exemplars = exemplars;
    if (set.value.trim()) body.exemplar_set = set.value.trim();
    if (first.value !== "") body.num_exemplars = Number(first.value);
    return body;
  }

  exemplars() {
    return [...this.list.children].map((item) => {
      const part = (name) => item.querySelector(`[data-part=${name}]`).value;
      const exemplar = { input: part("input"), output: part("output") };
      return part("rationale").trim() ? { ...exemplar, rationale: part("rationale") } : exemplar;
    });
  }

  fill(example) {
    for (const name of SEPARATE) {
      const value = example[name] ?? "";
      this.form.elements[name].value = Array.isArray(value) ? value.join("\n") : value;
    }
    this.form.elements.exemplar_set.value = this.form.elements.num_exemplars.value = "";
    this.list.replaceChildren();
    for (const exemplar of example.exemplars ?? []) this.add(exemplar);
    this.form.querySelector(".exemplars").open = Boolean(example.exemplars);
    this.#renumber();
  }

  add(exemplar, { focus = false } = {}) {
    const item = document.getElementById("exemplar-template").content.firstElementChild.cloneNode(true);
    for (const area of item.querySelectorAll("[data-part]")) area.value = exemplar[area.dataset.part] ?? "";
    this.list.append(item);
    this.#renumber();
    if (focus) {
      item.querySelector("[data-part=input]").focus();
      this.form.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }

  // Fields that no pane's mode uses say so.
  show(modes) {
    for (const part of this.form.querySelectorAll("[data-not-in]")) {
      const unused = part.dataset.notIn.split(" ");
      part.classList.toggle("unused", modes.every((mode) => unused.includes(mode)));
    }
    const hint = this.form.querySelector("#instruction-hint");
    hint.textContent = modes.every((mode) => mode === "raw") ? "The whole prompt, as the model reads it." : "The task in words.";
  }

  #act(button) {
    const item = button.closest(".exemplar");
    if (!item || !button.dataset.do) return;
    const place = [...this.list.children].indexOf(item);
    if (button.dataset.do === "remove") {
      const next = item.nextElementSibling ?? item.previousElementSibling;
      item.remove();
      (next?.querySelector("[data-do=remove]") ?? this.form.querySelector("#add-exemplar")).focus();
      this.announce(`Exemplar ${place + 1} removed`);
    } else if (button.dataset.do === "up") item.previousElementSibling?.before(item);
    else item.nextElementSibling?.after(item);
    this.#renumber();
    if (item.isConnected) {
      (button.disabled ? item.querySelector(".icon:not(:disabled)") : button).focus();
      this.announce(`Now exemplar ${[...this.list.children].indexOf(item) + 1}`);
    }
    this.form.dispatchEvent(new Event("input", { bubbles: true }));
  }

  #renumber() {
    const items = [...this.list.children];
    this.count.textContent = items.length || "none";
    items.forEach((item, index) => {
      const name = `Exemplar ${index + 1}`;
      item.querySelector(".exemplar-name").textContent = name;
      item.setAttribute("aria-label", name);
      for (const area of item.querySelectorAll("[data-part]")) {
        area.id = `exemplar-${index}-${area.dataset.part}`;
        area.previousElementSibling.htmlFor = area.id;
      }
      for (const button of item.querySelectorAll("[data-do]")) {
        const words = { up: `Move ${name} up`, down: `Move ${name} down`, remove: `Remove ${name}` };
        button.setAttribute("aria-label", words[button.dataset.do]);
      }
      item.querySelector("[data-do=up]").disabled = index === 0;
      item.querySelector("[data-do=down]").disabled = index === items.length - 1;
    });
  }
}
