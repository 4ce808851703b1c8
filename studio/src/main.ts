import { mount } from "svelte";
import App from "./App.svelte";
import "./styles/tokens.css";
import "./styles/base.css";

const target = document.getElementById("studio");
if (!target) throw new Error("index.html lacks #studio");
mount(App, { target });

// Browsers run service workers only over https or on this machine; elsewhere the studio is a page like any other.
if ("serviceWorker" in navigator && import.meta.env.PROD) void navigator.serviceWorker.register("/sw.js");
