"use strict";
// The tip of a bar, of a sample in the pack and of a token; "open all"; links into closed parts.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const ofToken = (token) => {
    const pre = token.closest(".tokens");
    const number = Number(pre.dataset.first) + [...pre.querySelectorAll("i")].indexOf(token);
    const run = token.closest(".r");
    const weight = run.dataset.w ?? (run.classList.contains("s") ? "1" : "0");
    const kind = token.classList.contains("c") ? " · special" : "";
    const lines = [...token.childNodes].map((n) => (n.className === "n" ? "" : n.textContent));
    const use = weight === "0" ? "not trained on" : `trained on, weight ${weight}`;
    return `token ${number.toLocaleString("en-US")}${kind} · ${use}\n${JSON.stringify(lines.join(""))}`;
  };

  const show = (target, event) => {
    tip.textContent = target.dataset.tip ?? ofToken(target);
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const [page, screen] = [document.documentElement.clientWidth, innerHeight];
    const below = event.clientY + 18 + height < screen;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, page - width - 4))}px`;
    tip.style.top = `${below ? event.clientY + 18 : Math.max(4, event.clientY - height - 12)}px`;
  };

  for (const kind of ["pointermove", "pointerdown"]) addEventListener(kind, (event) => {
    const target = event.target.closest?.("[data-tip], .tokens i");
    if (target) show(target, event);
    else tip.hidden = true;
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });

  const groups = [...document.querySelectorAll("details.group")];
  const button = document.querySelector("button.all");
  const name = () => { button.textContent = groups.every((d) => d.open) ? "Close all" : "Open all"; };
  if (button && groups.length > 1) {
    button.hidden = false;
    button.onclick = () => {
      const open = !groups.every((d) => d.open);
      groups.forEach((d) => { d.open = open; });
    };
    groups.forEach((d) => d.addEventListener("toggle", name));
    name();
  }
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
  });
})();
