// A click on a column's head sorts by it: numbers by value (with units of bytes), the rest by letters.
const units = { B: 1, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
const value = (text) => {
  const parts = /^([+-]?[\d.]+(?:e[+-]?\d+)?)\s*(%|[kMGT]?B)?(?:\s|$)/.exec(text);
  return parts ? parseFloat(parts[1]) * (units[parts[2]] || 1) : null;
};
const sort = (head) => {
  const body = head.closest("table").tBodies[0];
  const column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const compare = (a, b) => {
    const [s, t] = [a.cells[column].textContent, b.cells[column].textContent];
    const [x, y] = [value(s), value(t)];
    // What was not measured comes last either way.
    if ((x === null) !== (y === null)) return x === null ? 1 : -1;
    const order = x !== null ? x - y : s.localeCompare(t);
    return down ? -order : order;
  };
  body.append(...[...body.rows].sort(compare));
};
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(head); });
}
