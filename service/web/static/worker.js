// Computes colours beside the page, which stays responsive meanwhile.

import { principalColors } from "./pca.js";

self.onmessage = ({ data: { sets, channels }, ports: [answer] }) => {
  answer.postMessage(principalColors(sets, channels));
};
