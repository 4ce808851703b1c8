/** Which screen is shown: the hash of the address, so that Back works and the server has one page to send. */

export const SCREENS = ["create", "gallery", "compare", "machine"] as const;
export type Screen = (typeof SCREENS)[number];

function read(): Screen {
  const name = location.hash.replace(/^#\/?/, "");
  return SCREENS.find((screen) => screen === name) ?? "create";
}

class Route {
  screen = $state<Screen>(read());

  constructor() {
    addEventListener("hashchange", () => (this.screen = read()));
  }

  go(screen: Screen): void {
    location.hash = `/${screen}`;
  }
}

export const route = new Route();
