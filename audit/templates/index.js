// Two ticked runs: their comparison where there is one, and the command that makes it.
"use strict";
(() => {
  const picks = [...document.querySelectorAll("input.pick")];
  const words = document.querySelector("#compare-words");
  const line = document.querySelector("#compare-command");
  const code = line.querySelector("code");
  const copy = line.querySelector("button");
  const start = words.innerHTML;
  let ticked = [];

  function findComparison(first, second) {
    const names = [first.dataset.name, second.dataset.name].sort().join("\n");
    return [...document.querySelectorAll("li[data-a]")].find(
      (item) => [item.dataset.a, item.dataset.b].sort().join("\n") === names,
    );
  }

  function show() {
    line.hidden = ticked.length < 2;
    if (!ticked.length) { words.innerHTML = start; return; }
    if (ticked.length === 1) { words.textContent = `${ticked[0].dataset.name} against which other?`; return; }
    const [first, second] = ticked;
    const made = findComparison(first, second);
    words.replaceChildren();
    if (made) {
      const link = made.querySelector("a").cloneNode(true);
      words.append("Compared before: ", link, ". To compare again, type:");
    } else {
      words.append("To compare them case by case, type:");
    }
    code.textContent = `python final_evaluation_v2.py --compare ${first.dataset.path} ${second.dataset.path}`;
    copy.textContent = "Copy";
  }

  for (const pick of picks) {
    pick.addEventListener("change", () => {
      ticked = pick.checked ? [...ticked, pick] : ticked.filter((other) => other !== pick);
      while (ticked.length > 2) ticked.shift().checked = false; // the one ticked first makes room
      show();
    });
    pick.checked = false; // a reload keeps ticks, this page does not
  }

  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no right to the clipboard: selected for Ctrl-C
      copy.textContent = "Selected";
    }
  });
})();
