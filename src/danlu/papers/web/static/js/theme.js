// Runs before anything is painted, so that a dark page does not flash white. Everything else is a module.
(() => {
  const root = document.documentElement;
  root.classList.replace("no-js", "js");
  try {
    const theme = JSON.parse(localStorage.getItem("danlu.theme") || '""');
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  } catch { /* storage is closed or holds something else: the system's theme it is */ }
})();
