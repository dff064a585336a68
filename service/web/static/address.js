/** Where the page lies; without the user and key of an address like http://:KEY@host/. */
export function pageAddress() {
  return location.origin + location.pathname;
}
