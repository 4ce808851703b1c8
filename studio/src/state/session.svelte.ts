/** Whether the server lets us in. It asks for a token where it listens to more than this machine. */

import { access, api, ApiError } from "../lib/api";
import { events } from "./events.svelte";

class Session {
  wanted = $state(false);
  wrong = $state("");

  constructor() {
    access.wanted = () => (this.wanted = true);
  }

  async login(token: string): Promise<void> {
    try {
      await api.login(token.trim());
      this.wanted = false;
      this.wrong = "";
      events.open();
    } catch (error) {
      this.wrong = error instanceof ApiError ? error.message : String(error);
    }
  }
}

export const session = new Session();
