/** Light, dark, or what the machine prefers. public/theme.js applies the choice before the first paint. */

export type Theme = "auto" | "light" | "dark";
const KEY = "linocut.theme";

class ThemeChoice {
  value = $state<Theme>((localStorage.getItem(KEY) as Theme | null) ?? "auto");

  set(theme: Theme): void {
    this.value = theme;
    if (theme === "auto") {
      localStorage.removeItem(KEY);
      delete document.documentElement.dataset.theme;
    } else {
      localStorage.setItem(KEY, theme);
      document.documentElement.dataset.theme = theme;
    }
  }
}

export const theme = new ThemeChoice();
