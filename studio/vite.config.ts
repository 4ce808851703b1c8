import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// The build is committed into the Python package, so that neither a wheel nor an editable install needs Node.
export default defineConfig({
  plugins: [svelte()],
  build: {
    outDir: "../src/linocut/server/studio",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  // `npm run dev` shows the studio with live reload; `linocut serve` answers its requests.
  server: { proxy: { "/api": "http://127.0.0.1:7860", "/v1": "http://127.0.0.1:7860" } },
});
