// Asks for an API key. It is kept by who asked, in memory, and nowhere else.
import { at } from "./dom.js";

export function askKey(refused) {
  const form = at("key");
  at("refused").textContent = refused ? "This key is not known here." : "";
  at("figures").hidden = true;
  form.hidden = false;
  at("secret").focus();
  return new Promise((resolve) => {
    const submitted = (event) => {
      event.preventDefault();
      form.removeEventListener("submit", submitted);
      resolve(at("secret").value.trim());
      at("secret").value = "";
    };
    form.addEventListener("submit", submitted);
  });
}

export function keyTaken() {
  if (at("key").hidden) return;
  at("key").hidden = true;
  at("figures").hidden = false;
  at("figures").focus();
}
