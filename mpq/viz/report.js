"use strict";
// Without this script the report is complete; with it, the table of layers can be sorted and filtered.
{
  const table = document.getElementById("layers-table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const heads = [...table.tHead.rows[0].cells];

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, "en", { numeric: true });
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // Numbers: the largest first, since those are looked for.
      const first = head.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      body.append(...rows);
    });
  });
  heads[1].setAttribute("aria-sort", "ascending");

  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const show = () => {
    const terms = filter.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => { row.hidden = !terms.every((term) => words.get(row).includes(term)); });
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} layers`;
  };
  filter.addEventListener("input", show);
  document.getElementById("tools").hidden = false;
  show();
}
