// An MQTT device with the npm package `mqtt` that keeps its session: subscribes and leaves, or comes back for what it has missed.
//
// mqttjs_session.js PORT DEVICE TOKEN 311|5 subscribe|receive COUNT     Prints the payloads, a line each.
// At its end it publishes one message at every QoS to `telemetry`.
"use strict";
const mqtt = require("mqtt");

const [port, device, token, version, task, count] = process.argv.slice(2);
const options = {
  clientId: device,
  username: device,
  password: token,
  clean: false,
  protocolVersion: version === "5" ? 5 : 4,
  reconnectPeriod: 0,
  connectTimeout: 15000,
  properties: version === "5" ? { sessionExpiryInterval: 600 } : undefined,
};

function fail(error) {
  console.error(error);
  process.exit(1);
}

async function main() {
  setTimeout(() => fail("no end within 30 s"), 30000).unref();
  const client = mqtt.connect(`mqtt://127.0.0.1:${port}`, options);
  client.on("error", fail);
  let left = Number(count);
  const received = new Promise((resolve) => {
    if (left === 0) resolve();
    client.on("message", (_topic, payload) => {
      console.log(payload.toString());
      left -= 1;
      if (left === 0) resolve();
    });
  });
  const present = await new Promise((resolve) => client.on("connect", (packet) => resolve(packet.sessionPresent)));
  if (present !== (task === "receive")) fail(`session present: ${present}`);
  if (task === "subscribe") {
    const granted = await client.subscribeAsync("plant/#", { qos: 2 });
    if (granted[0].qos !== 2) fail(`granted ${JSON.stringify(granted)}`);
  }
  await received;
  for (const qos of [0, 1, 2]) await client.publishAsync("telemetry", `mqtt.js ${version} ${task} ${qos}`, { qos });
  await client.endAsync();
}

main().catch(fail);
