/** A blind vote between two models: pairs of one prompt and one seed, shown in random order without names. */

import { keep, recall } from "../lib/browser";
import { csv } from "../lib/csv";
import type { Picture } from "../lib/types";
import { randomSeed } from "./draft.svelte";
import { jobs } from "./jobs.svelte";
import { models } from "./models.svelte";
import { toasts } from "./toasts.svelte";

export type Choice = "left" | "right" | "tie";

export interface Ballot {
  prompt: string;
  seed: number;
  left: string;
  right: string;
  choice: Choice;
  time: string;
}

export interface Pair {
  prompt: string;
  seed: number;
  left: Picture;
  right: Picture;
}

const COLUMNS = ["prompt", "seed", "left", "right", "choice", "winner", "time"];

class Vote {
  ballots = $state<Ballot[]>(recall("ballots", []));
  pairs = $state<Pair[]>([]);
  pending = $state(0);
  #stop = new AbortController();

  pair = $derived(this.pairs[0]);

  /** Draw a pair of each prompt; they can be voted on as they come. */
  async start(prompts: readonly string[], first: string, second: string): Promise<void> {
    this.stop();
    const { signal } = (this.#stop = new AbortController());
    this.pending = prompts.length;
    try {
      for (const prompt of prompts) {
        const pair = await this.#draw(prompt, first, second, signal);
        if (signal.aborted) return;
        this.pairs = [...this.pairs, pair];
        this.pending -= 1;
      }
    } catch (error) {
      if (signal.aborted) return;
      this.pending = 0;
      toasts.fail(error);
    }
  }

  stop(): void {
    this.#stop.abort();
    this.pairs = [];
    this.pending = 0;
  }

  async #draw(prompt: string, first: string, second: string, signal: AbortSignal): Promise<Pair> {
    const one = models.find(first);
    const two = models.find(second);
    if (!one || !two) throw new Error("Choose two models first.");
    const seed = randomSeed();
    const [width, height] = one.default_size;
    const [left, right] = await Promise.all((randomSeed() % 2 ? [one, two] : [two, one]).map((model) =>
      jobs.picture({ prompt, seed, model: model.name, width, height, steps: model.default_steps, num_images: 1 }, signal)));
    if (!left || !right) throw new Error("A pair has two pictures.");
    return { prompt, seed, left, right };
  }

  cast(choice: Choice): void {
    const pair = this.pair;
    if (!pair) return;
    const { prompt, seed, left, right } = pair;
    this.ballots = [...this.ballots, { prompt, seed, left: left.model, right: right.model, choice, time: new Date().toISOString() }];
    this.pairs = this.pairs.slice(1);
    keep("ballots", this.ballots);
  }

  /** Wins of each model, and ties. */
  get counts(): { wins: Map<string, number>; ties: number } {
    const wins = new Map<string, number>();
    let ties = 0;
    for (const ballot of this.ballots) {
      for (const model of [ballot.left, ballot.right]) if (!wins.has(model)) wins.set(model, 0);
      const winner = winnerOf(ballot);
      if (winner) wins.set(winner, (wins.get(winner) ?? 0) + 1);
      else ties += 1;
    }
    return { wins, ties };
  }

  csv(): string {
    return csv([COLUMNS, ...this.ballots.map((each) =>
      [each.prompt, each.seed, each.left, each.right, each.choice, winnerOf(each) ?? "", each.time])]);
  }

  clear(): void {
    const before = this.ballots;
    this.ballots = [];
    keep("ballots", []);
    toasts.say("The votes are gone.", { label: "Undo", run: () => { this.ballots = before; keep("ballots", before); } });
  }
}

function winnerOf(ballot: Ballot): string | null {
  return ballot.choice === "tie" ? null : ballot[ballot.choice];
}

export const vote = new Vote();
