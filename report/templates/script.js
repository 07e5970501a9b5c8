"use strict";
(() => {
  const tip = document.getElementById("tip");
  const CELL = ".map tbody td";
  const MARK = ".role-mark > [aria-label]";

  // The numbers of an expert, by the names that its table gives them.
  const cellText = (cell) => {
    const table = cell.closest("table");
    const names = table.dataset.names.split(", ");
    const [state, ...values] = cell.textContent.split("; ");
    const expert = table.tHead.rows[0].cells[cell.cellIndex].textContent;
    const layer = cell.parentElement.cells[0].title;
    return [`${layer}, expert ${expert}: ${state}`, ...values.map((value, at) => `${names[at]}: ${value}`)].join("\n");
  };
  const textOf = (item) => (item.matches(CELL) ? cellText(item) : item.getAttribute("aria-label"));

  const show = (item, x, y) => {
    const text = textOf(item);
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.min(Math.max(x - box.width / 2, 8), innerWidth - box.width - 8)}px`;
    tip.style.top = `${y - box.height - 14 < 8 ? y + 22 : y - box.height - 14}px`;
  };
  const hide = () => { tip.hidden = true; };

  document.addEventListener("pointermove", (event) => {
    const item = event.target.closest(`${CELL}, ${MARK}`);
    if (item) show(item, event.clientX, event.clientY);
    else if (!document.querySelector(".here")) hide();
  });
  document.addEventListener("pointerdown", (event) => {
    const item = event.target.closest(`${CELL}, ${MARK}`);
    if (item) show(item, event.clientX, event.clientY);
    else hide();
  });

  // Arrow keys go from cell to cell of a map, and from mark to mark of a chart.
  const walk = (area, items, columns) => {
    let at = -1;
    area.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: items.length };
      if (event.key === "Escape") hide();
      if (!(event.key in steps) || !items.length) return;
      event.preventDefault();
      items[at]?.classList.remove("here");
      at = at < 0 ? 0 : Math.min(Math.max(at + steps[event.key], 0), items.length - 1);
      items[at].classList.add("here");
      items[at].scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
      const box = items[at].getBoundingClientRect();
      show(items[at], box.left + box.width / 2, box.top);
    });
    area.addEventListener("blur", () => {
      items[at]?.classList.remove("here");
      hide();
    });
  };
  for (const area of document.querySelectorAll(".map .scroll")) {
    walk(area, [...area.querySelectorAll("tbody td")], area.querySelectorAll("thead th").length - 1);
  }
  for (const svg of document.querySelectorAll(".chart svg")) {
    svg.setAttribute("tabindex", "0");
    walk(svg, [...svg.querySelectorAll(MARK)], 1);
  }

  // Light or dark: what the system says, until the button is pressed.
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  button.hidden = false;
  label();

  const shades = document.querySelector(".switch");
  if (shades) {
    shades.hidden = false;
    shades.addEventListener("change", (event) => {
      for (const map of document.querySelectorAll(".map")) map.dataset.by = event.target.value;
    });
  }

  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      const lines = copy.parentElement.querySelector("code").children;
      await navigator.clipboard.writeText([...lines].map((line) => `${line.textContent.trim()}\n`).join(""));
      copy.textContent = "Copied";
    });
  }
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
})();
