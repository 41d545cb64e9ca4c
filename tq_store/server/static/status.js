// Puts a fresh copy of the page's numbers in place of the old ones. The server draws them; this only fetches.
"use strict";

const pause = Number(document.body.dataset.stepSeconds) * 1000;

async function refresh() {
  let answered = false;
  try {
    const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (answer.ok) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.querySelector("main").replaceWith(fresh.querySelector("main"));
      answered = true;
    }
  } catch {
    // shown below; the next try may succeed
  }
  document.body.classList.toggle("stale", !answered);
  setTimeout(refresh, pause);
}

setTimeout(refresh, pause);
