// Starts what a page needs; each part looks for its own elements and does nothing where there are none.
import { start as chooser } from "./chooser.js";
import { start as chunks } from "./chunks.js";
import { start as find } from "./find.js";
import { start as keys } from "./keys.js";
import { start as papers } from "./papers.js";
import { start as preference } from "./preference.js";
import { start as settings } from "./settings.js";
import { start as starred } from "./starred.js";
import { dress } from "./cards.js";

papers();
dress(document);
chunks();
chooser();
find();
keys();
preference();
settings();
starred();
