// A dot says its case when it is pointed at or reached by keyboard; the search narrows the table.
"use strict";
(() => {
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
