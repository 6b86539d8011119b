// What axe-core finds wanting in the theme: the search has no name, and wide code and tables cannot be scrolled by keyboard.
document.querySelectorAll(".md-search").forEach(search => search.setAttribute("aria-label", "Search"));
document.querySelectorAll("pre > code, .md-typeset__scrollwrap, .md-typeset__table").forEach(box => box.setAttribute("tabindex", "0"));
