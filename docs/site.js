// What axe-core finds wanting in the theme: the search has no name, and wide code and tables cannot be scrolled by
// keyboard. The theme takes tabindex away again where nothing hovers, and wraps tables later: hence the observer.
const mend = () => {
  document.querySelectorAll(".md-search").forEach(search => search.setAttribute("aria-label", "Search"));
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach(box => {
    if (!box.hasAttribute("tabindex")) box.setAttribute("tabindex", "0");
  });
};
new MutationObserver(mend).observe(document.body, { subtree: true, childList: true, attributeFilter: ["tabindex"] });
mend();
