// What a run brought, as elements: the text as it comes, then rationale, answer and votes apart.

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export class Output {
  constructor(root) {
    this.root = root;
    this.texts = [];
  }

  begin(mode, outputs) {
    this.mode = mode;
    this.texts = Array.from({ length: outputs }, () => make("p", "text", ""));
    if (outputs === 1) {
      if (mode === "cot") this.texts[0].classList.add("thinking");
      this.root.replaceChildren(this.texts[0]);
    } else {
      const list = make("ol", "texts");
      for (const text of this.texts) list.append(make("li"));
      [...list.children].forEach((item, index) => item.append(this.texts[index]));
      this.root.replaceChildren(list);
    }
  }

  add(index, piece) {
    this.texts[index]?.append(piece);
  }

  get isEmpty() {
    return this.texts.every((text) => text.textContent === "");
  }

  // The last frame has the whole: mode cot is shown anew, with its parts; in other modes the text stands already.
  end(frame) {
    if (this.mode === "cot") this.#showChain(frame);
    else this.texts.filter((text) => text.textContent === "").forEach((text) => text.replaceChildren(make("em", "", "empty text")));
    if (frame.prompt !== undefined) {
      const details = make("details", "prompt");
      details.append(make("summary", "", "Rendered prompt"), make("p", "text", frame.prompt));
      if (frame.stop?.length) details.append(make("p", "hint", `Stop texts: ${frame.stop.map((text) => `“${text}”`).join(", ")}`));
      this.root.append(details);
    }
  }

  #showChain(frame) {
    const parts = [this.#answer(frame)];
    if (frame.votes) parts.push(this.#votes(frame));
    if (frame.outputs.length === 1) {
      const { rationale, text } = frame.outputs[0];
      parts.push(make("h3", "eyebrow", "Rationale"), make("p", "text thinking", rationale || text));
    } else {
      const details = make("details", "samples");
      const list = make("ol", "texts");
      for (const output of frame.outputs) {
        const item = make("li");
        item.append(make("p", "text", output.rationale || output.text), make("p", "said", output.answer ?? "no answer"));
        list.append(item);
      }
      details.append(make("summary", "", `The ${frame.outputs.length} samples`), list);
      details.open = true;
      parts.push(details);
    }
    this.root.replaceChildren(...parts);
  }

  #answer(frame) {
    const block = make("div", "answer");
    block.append(make("h3", "eyebrow", "Answer"));
    block.append(frame.answer === null ? make("p", "none", "none: the text has no answer sentence") : make("p", "final", frame.answer));
    return block;
  }

  #votes(frame) {
    const total = frame.votes.reduce((sum, vote) => sum + vote.count, 0);
    const list = make("ul", "votes");
    list.setAttribute("aria-label", "Votes");
    for (const vote of frame.votes) {
      const item = make("li", vote.answer === frame.answer ? "won" : "");
      const bar = make("span", "bar");
      bar.setAttribute("aria-hidden", "true");
      bar.style.setProperty("--share", `${(100 * vote.count) / total}%`);
      const weight = vote.weight >= 0.005 ? vote.weight.toFixed(2) : vote.weight > 0 ? "<0.01" : "0";
      item.append(make("span", "choice", vote.answer ?? "no answer"), bar);
      item.append(make("span", "tally", `${vote.count} of ${total}`), make("span", "weight", `weight ${weight}`));
      list.append(item);
    }
    const block = make("div", "ballot");
    block.append(list);
    if (frame.tie) block.append(make("p", "hint", "A tie: the likelier chains decided."));
    return block;
  }
}
