"use strict";
const main = document.querySelector("main");
const connection = document.getElementById("connection");
const name = (details) => details.querySelector("summary").textContent.replace(/\d+/g, "");

async function swap() {
  const answer = await fetch("report", { cache: "no-store" });
  if (!answer.ok) throw new Error(answer.status);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const before = new Map([...main.querySelectorAll("details")].map((one) => [name(one), one.open]));
  for (const one of fresh.querySelectorAll("main details")) one.open = before.get(name(one)) ?? one.open;
  main.replaceChildren(...fresh.querySelector("main").childNodes);
  document.title = fresh.title;
}

const events = new EventSource("events");
events.onopen = () => { connection.hidden = true; };
events.onmessage = () => swap().catch(() => {});
events.onerror = () => {
  connection.textContent = "The program that serves this page does not answer: it has ended, or is stopped. "
    + "What stands below is the last that was heard.";
  connection.hidden = false;
};
