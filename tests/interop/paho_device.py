"""An MQTT device with paho: connects, subscribes, publishes at every QoS, and gets its own messages back.

paho_device.py PORT DEVICE TOKEN 311|5 tcp|websockets        Prints `ok` last.
"""

import queue
import sys

import paho.mqtt.client as paho

port, device, token, version, transport = sys.argv[1:6]
protocol = paho.MQTTv5 if version == "5" else paho.MQTTv311
client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=device, protocol=protocol, transport=transport)
client.username_pw_set(device, token)
events = queue.Queue()
client.on_connect = lambda _c, _u, _f, reason, _p: events.put(("connect", reason.is_failure))
client.on_subscribe = lambda _c, _u, _m, reasons, _p: events.put(("subscribe", [r.value for r in reasons]))
client.on_publish = lambda _c, _u, mid, reason, _p: events.put(("published", mid, reason.is_failure))
client.on_message = lambda _c, _u, message: events.put(("message", message.topic, message.payload))
client.on_disconnect = lambda _c, _u, _f, reason, _p: events.put(("disconnect", reason.value))


def wait(kind):
    while True:
        event = events.get(timeout=15)
        if event[0] == kind:
            return event
        assert event[0] != "disconnect", event


client.connect("127.0.0.1", int(port), keepalive=30)
client.loop_start()
assert wait("connect") == ("connect", False)
client.subscribe("plant/paho/#", qos=2)
assert wait("subscribe")[1] == [2]
for qos in (0, 1, 2):
    payload = f"paho {version} qos {qos}".encode()
    client.publish("plant/paho/x", payload, qos=qos)
    topic, got = wait("message")[1:]
    assert (topic, got) == ("plant/paho/x", payload), (topic, got)
client.publish("t", f"from paho {version} {transport}", qos=1).wait_for_publish(15)
client.publish("plant/paho/kept", b"kept", qos=1, retain=True).wait_for_publish(15)
wait("message")
client.unsubscribe("plant/paho/#")
client.subscribe("plant/paho/kept", qos=1)
assert wait("message")[2] == b"kept", "a retained message comes with the subscription"
client.publish("plant/paho/kept", b"", qos=1, retain=True).wait_for_publish(15)
client.disconnect()
client.loop_stop()
print("ok")
