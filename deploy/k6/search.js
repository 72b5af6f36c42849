// Searches under load by k6, which learns the API by reflection:   make load COLLECTION=pictures
//
// Environment: ADDRESS, COLLECTION; PICTURE, a file to search with (items of the collection where absent); TLS=1; KEY, an API
// key; VUS clients that each ask again once answered (a closed loop), or RATE searches a second, answered or not (an open
// loop, which shows what a queue does); DURATION; P95, the milliseconds that 95 % of the searches must not take longer than.
// The exit code is 99 where a check fails or P95 is exceeded.
import { check } from "k6";
import encoding from "k6/encoding";
import { Client, StatusOK } from "k6/net/grpc";

const { ADDRESS = "localhost:50051", COLLECTION = "pictures", PICTURE, TLS, KEY, RATE } = __ENV;
const VUS = Number(__ENV.VUS || 8);
const DURATION = __ENV.DURATION || "30s";

export const options = {
  scenarios: {
    search: RATE
      ? { executor: "constant-arrival-rate", rate: Number(RATE), duration: DURATION, preAllocatedVUs: VUS, maxVUs: 8 * VUS }
      : { executor: "constant-vus", vus: VUS, duration: DURATION },
  },
  thresholds: {
    checks: ["rate==1"],
    "grpc_req_duration{call:search}": [`p(95)<${__ENV.P95 || 250}`],
    dropped_iterations: ["count==0"],
  },
  summaryTrendStats: ["med", "p(95)", "p(99)", "max"],
};

const path = PICTURE && !PICTURE.startsWith("/") ? `${__ENV.PWD}/${PICTURE}` : PICTURE;
const picture = path ? encoding.b64encode(open(path, "b")) : null;
const client = new Client();
const params = (call) => ({ metadata: KEY ? { authorization: `Bearer ${KEY}` } : {}, tags: { call } });
let connected = false; // each client keeps its connection

function invoke(method, request, call) {
  if (!connected) {
    client.connect(ADDRESS, { plaintext: !TLS, reflect: true, reflectMetadata: params(call).metadata });
    connected = true;
  }
  return client.invoke(`likewise.v1.${method}`, request, params(call));
}

// Keys to search with.
export function setup() {
  const reply = invoke("CollectionService/ListItems", { collection: COLLECTION, page_size: 1000 }, "list");
  if (reply.status !== StatusOK || !reply.message.items.length) {
    throw new Error(`no items in ${COLLECTION}: ${reply.error ? reply.error.message : "it is empty"}`);
  }
  client.close();
  return reply.message.items.map((item) => item.key);
}

export default function (keys) {
  const key = keys[Math.floor(Math.random() * keys.length)];
  const query = picture ? { image: { content: picture } } : { key };
  const reply = invoke("SearchService/Search", { collection: COLLECTION, query, top_k: 10 }, "search");
  const scores = reply.message && reply.message.neighbors ? reply.message.neighbors.map((n) => n.score) : [];
  check(reply, {
    "status is OK": (r) => r.status === StatusOK,
    "neighbours, best first": () => scores.length > 0 && scores.every((s, i) => !i || s <= scores[i - 1]),
  });
}
