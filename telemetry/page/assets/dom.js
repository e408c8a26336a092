// Elements of the page.

export const at = (id) => document.getElementById(id);

export function element(name, content, kind) {
  const e = document.createElement(name);
  e.textContent = content;
  if (kind) e.className = kind;
  return e;
}

// fill leaves alone what is there already: a selection in it stays.
export function fill(parent, children) {
  const same = parent.children.length === children.length && children.every((c, i) => c.isEqualNode(parent.children[i]));
  if (!same) parent.replaceChildren(...children);
}

// rows makes a table; the first cell of each row heads it.
export function rows(table, head, body) {
  const line = (cells, names) => {
    const tr = document.createElement("tr");
    cells.forEach((c, i) => {
      const e = element(names(i), c);
      if (e.tagName === "TH") e.scope = names(1) === "th" ? "col" : "row";
      tr.append(e);
    });
    return tr;
  };
  const thead = document.createElement("thead");
  thead.append(line(head, () => "th"));
  const tbody = document.createElement("tbody");
  tbody.append(...body.map((cells) => line(cells, (i) => (i === 0 ? "th" : "td"))));
  fill(table, [thead, tbody]);
}
