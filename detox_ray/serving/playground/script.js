// What is shown is kept on <body>, so that it outlives the cards, which are drawn again with every token.
(() => {
  const state = () => document.body.dataset;
  const shownPlaces = () => new Set((state().shown || "").split(" ").filter(Boolean));
  const show = (places) => { state().shown = [...places].join(" "); };

  const toggle = (place) => {
    const shown = shownPlaces();
    if (shown.delete(place)) delete state().showAll;
    else shown.add(place);
    show(shown);
  };

  const toggleAll = () => {
    const places = [...document.querySelectorAll(".answers .card")].map((card) => card.dataset.place);
    if (state().showAll) delete state().showAll;
    else state().showAll = "yes";
    show(state().showAll ? places : []);
  };

  document.addEventListener("click", (event) => {
    const on = (selector) => event.target.closest(selector);
    if (on("#ask")) {
      delete state().stopped;
      if (!state().showAll) show([]);
    }
    if (on("#stop")) state().stopped = "yes";
    if (on(".reveal-all")) toggleAll();
    const card = on(".answers .card");
    if (!card) return;
    const hidden = !shownPlaces().has(card.dataset.place);
    if (on(".reveal") || (hidden && on(".text"))) toggle(card.dataset.place);
    else if (on(".token") && !hidden) card.querySelector(".told").textContent = on(".token").title;
  });

  // Another permalink opened in the same tab.
  window.addEventListener("hashchange", () => location.reload());
})();
