"""An MQTT device with paho that keeps its session: subscribes and leaves, or comes back for what it has missed.

paho_session.py PORT DEVICE TOKEN 311|5 subscribe|receive COUNT     Prints the payloads, a line each.
"""

import queue
import sys

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

port, device, token, version, task, count = sys.argv[1:7]
five = version == "5"
callbacks = paho.CallbackAPIVersion.VERSION2
if five:
    client = paho.Client(callbacks, client_id=device, protocol=paho.MQTTv5)
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 600
    start = {"clean_start": False, "properties": properties}
else:
    client = paho.Client(callbacks, client_id=device, protocol=paho.MQTTv311, clean_session=False)
    start = {}
client.username_pw_set(device, token)
events = queue.Queue()
client.on_connect = lambda _c, _u, flags, reason, _p: events.put((reason.is_failure, flags.session_present))
client.on_subscribe = lambda *_: events.put("subscribed")
client.on_message = lambda _c, _u, message: events.put(message.payload.decode())
client.connect("127.0.0.1", int(port), keepalive=30, **start)
client.loop_start()
assert events.get(timeout=15) == (False, task == "receive"), "the session is there exactly when it was left there"
if task == "subscribe":
    client.subscribe("plant/#", qos=2)
    assert events.get(timeout=15) == "subscribed"
for _ in range(int(count)):
    print(events.get(timeout=15))
client.disconnect()
client.loop_stop()
