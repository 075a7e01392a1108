// A dot says its case when it is pointed at or reached by keyboard; cases open with both predictions in one viewer; the
// search narrows the table.
"use strict";
(() => {
  const data = new Map([...document.querySelectorAll("script.case")].map((script) => [script.dataset.case, script]));
  const dialog = document.querySelector("#viewer");
  const viewer = new Viewer(dialog.querySelector(".viewer"));

  document.addEventListener("click", async (event) => {
    const opener = event.target.closest("[data-open]");
    if (!opener) return;
    event.preventDefault(); // a dot leads to its row, where it does not open
    if (!dialog.open) dialog.showModal();
    await viewer.show(JSON.parse(data.get(opener.dataset.open).textContent), opener.dataset.region);
    dialog.querySelector("canvas").focus({ preventScroll: true });
  });
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  for (const dot of document.querySelectorAll("a[data-words]")) {
    const said = dot.closest("figure").querySelector(".said");
    const say = () => { said.textContent = dot.dataset.words; };
    dot.addEventListener("pointerenter", say);
    dot.addEventListener("focus", say);
    dot.addEventListener("click", () => {
      find.value = ""; // the row may be hidden
      narrow();
    });
  }

  const find = document.querySelector("#find");
  const count = document.querySelector("#count");
  const rows = [...document.querySelectorAll("table.cases tbody tr")];

  function narrow() {
    const wanted = find.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = wanted ? `${shown} of ${rows.length}` : "";
  }
  find.addEventListener("input", narrow);
})();
