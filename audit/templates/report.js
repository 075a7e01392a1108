// The audit's page: the case table's filters, dots that name their case, and the dialog with the viewer.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = new Map([...document.querySelectorAll("script.case")].map((script) => [script.dataset.case, script]));
  const rows = [...document.querySelectorAll("#case-table tbody tr")];
  const dialog = byId("viewer");
  const viewer = new Viewer(dialog.querySelector(".viewer"));
  let current = null;

  // ------------------------------------------------------------------------------------------------------- opening

  async function open(key, region) {
    byId("not-here").hidden = true;
    if (!data.has(key)) return pointOut(key);
    current = key;
    if (!dialog.open) dialog.showModal();
    await viewer.show(JSON.parse(data.get(key).textContent), region);
    dialog.querySelector("canvas").focus({ preventScroll: true });
    history.replaceState(null, "", `#case=${encodeURIComponent(key)}`);
  }

  // A case that is not embedded: its page, else its row in the table.
  function pointOut(key) {
    const row = rows.find((each) => each.dataset.case === key && !each.hidden) ?? rows.find((each) => each.dataset.case === key);
    const link = row?.querySelector("a");
    if (link) return link.click();
    if (!row) return;
    row.hidden = false;
    for (const each of rows) each.classList.toggle("found", each === row);
    row.scrollIntoView({ block: "center" });
    byId("not-here").textContent = `${row.cells[0].textContent.trim()} is not embedded in this page; its numbers are marked in the table.`;
    byId("not-here").hidden = false;
  }

  // The next case of the table, as it is sorted and filtered, that is embedded.
  function go(step) {
    const shown = [...document.querySelectorAll("#case-table tbody tr")].filter((row) => !row.hidden && data.has(row.dataset.case));
    const at = shown.findIndex((row) => row.dataset.case === current);
    const row = shown[(at + step + shown.length) % shown.length];
    if (row) open(row.dataset.case, row.dataset.region);
  }

  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-open], circle.dot");
    if (opener) open(opener.dataset.open ?? opener.dataset.case, opener.dataset.region);
  });
  for (const button of dialog.querySelectorAll("[data-go]")) {
    button.addEventListener("click", () => go(Number(button.dataset.go)));
  }
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));

  // ------------------------------------------------------------------------------------------------------ filtering

  function filter() {
    const wanted = byId("search").value.trim().toLowerCase();
    const cohort = byId("cohort")?.value ?? "", region = byId("region")?.value ?? "";
    let count = 0;
    for (const row of rows) {
      const isShown = (!cohort || row.dataset.cohort === cohort) && (!region || row.dataset.region === region)
        && (!wanted || row.textContent.toLowerCase().includes(wanted));
      row.hidden = !isShown;
      count += isShown;
    }
    byId("count").textContent = `${count} of ${region ? new Set(rows.map((row) => row.dataset.case)).size : rows.length} shown`;
  }

  for (const id of ["search", "cohort", "region"]) byId(id)?.addEventListener("input", filter);
  filter();

  // ----------------------------------------------------------------------------------------------------------- dots

  const hint = Object.assign(document.createElement("div"), { id: "hint", hidden: true });
  hint.setAttribute("role", "status");
  document.body.append(hint);
  for (const title of document.querySelectorAll("circle.dot > title")) { // shown at once and not after a second
    title.parentElement.dataset.says = title.textContent;
    title.remove();
  }
  document.addEventListener("pointerover", (event) => {
    const dot = event.target.closest?.("circle.dot");
    hint.hidden = !dot;
    if (!dot) return;
    const box = dot.getBoundingClientRect();
    hint.textContent = dot.dataset.says;
    hint.style.left = `${Math.max(4, Math.min(box.right + 6, innerWidth - hint.offsetWidth - 6))}px`;
    hint.style.top = `${Math.max(4, box.top - hint.offsetHeight - 4)}px`;
  });

  // ------------------------------------------------------------------------------------------------ paper and links

  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
  const linked = decodeURIComponent(location.hash.match(/^#case=(.+)/)?.[1] ?? "");
  if (data.has(linked)) open(linked);
})();
