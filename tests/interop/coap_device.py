"""A CoAP device in Python, written from the wire contract alone: aiocoap, cbor2 and cryptography, no code of Tidegate's.

coap_device.py PORT DEVICE KEY.pem GATEWAY_ID_HEX TCP_PORT    logs in by challenge, publishes, reads back, observes its own state, and so over TCP
Prints `ok` last.
"""

import asyncio
import base64
import hashlib
import os
import sys

import aiocoap
import cbor2
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key


def lp(part: bytes) -> bytes:
    return len(part).to_bytes(2, "big") + part


async def request(context, code, uri, payload=b"", **options):
    message = aiocoap.Message(code=code, uri=uri, payload=payload, **options)
    return await asyncio.wait_for(context.request(message).response, 10)


async def main():
    port, device, key_file, gateway_id, tcp_port = sys.argv[1:6]
    base = f"coap://127.0.0.1:{port}"
    with open(key_file, "rb") as file:
        key = load_pem_private_key(file.read(), None)
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    key_id = hashlib.sha256(public).digest()[:8]
    nonce = os.urandom(16)
    context = await aiocoap.Context.create_client_context()

    answer = await request(context, aiocoap.POST, f"{base}/auth/c", cbor2.dumps([device, nonce]))
    assert answer.code == aiocoap.CONTENT, answer.code
    challenge = answer.payload
    assert len(challenge) == 38, len(challenge)

    gateway = bytes.fromhex(gateway_id)
    transcript = lp(gateway) + lp(device.encode()) + lp(key_id) + lp(nonce) + lp(challenge) + lp(b"") + lp(b"")
    message = b"tidegate-device-auth/1\0" + bytes([1, 3, 0]) + hashlib.sha256(transcript).digest()
    assert len(message) == 58, len(message)
    session = cbor2.dumps([device, nonce, key_id, challenge, key.sign(message)])
    answer = await request(context, aiocoap.POST, f"{base}/auth/s", session)
    assert answer.code == aiocoap.CHANGED, (answer.code, answer.payload)
    login = cbor2.loads(answer.payload)
    token = base64.urlsafe_b64encode(login[1]).rstrip(b"=").decode()
    assert login[2] > 0, login

    again = await request(context, aiocoap.POST, f"{base}/auth/s", session)
    assert again.code == aiocoap.UNAUTHORIZED, f"a challenge works once: {again.code}"

    answer = await request(context, aiocoap.POST, f"{base}/t/room?t={token}", b"from aiocoap")
    assert answer.code == aiocoap.CHANGED, (answer.code, answer.payload)
    answer = await request(context, aiocoap.POST, f"{base}/t/room", b"without a token")
    assert answer.code == aiocoap.UNAUTHORIZED, answer.code
    # Longer than one block: goes up block-wise (RFC 7959).
    answer = await request(context, aiocoap.POST, f"{base}/t/long?t={token}", b"long " * 1000)
    assert answer.code == aiocoap.CHANGED, (answer.code, answer.payload)

    answer = await request(context, aiocoap.PUT, f"{base}/s?t={token}", b"first", content_format=0)
    assert answer.code == aiocoap.CHANGED, (answer.code, answer.payload)
    answer = await request(context, aiocoap.GET, f"{base}/s?t={token}")
    assert (answer.code, answer.payload) == (aiocoap.CONTENT, b"first"), (answer.code, answer.payload)

    observation = context.request(aiocoap.Message(code=aiocoap.GET, uri=f"{base}/s?t={token}", observe=0))
    first = await asyncio.wait_for(observation.response, 10)
    assert first.payload == b"first", first.payload
    notifications = observation.observation.__aiter__()
    await request(context, aiocoap.PUT, f"{base}/s?t={token}", b"second", content_format=0)
    second = await asyncio.wait_for(notifications.__anext__(), 10)
    assert second.payload == b"second", second.payload

    # Over TCP, with a body of many blocks' length in one message.
    base = f"coap+tcp://127.0.0.1:{tcp_port}"
    long = b"0123456789" * 2000
    answer = await request(context, aiocoap.PUT, f"{base}/s?t={token}", long, content_format=42)
    assert answer.code == aiocoap.CHANGED, (answer.code, answer.payload)
    answer = await request(context, aiocoap.GET, f"{base}/s?t={token}")
    assert (answer.code, answer.payload) == (aiocoap.CONTENT, long), (answer.code, len(answer.payload))
    # BERT (RFC 8323 section 6): two blocks of 1024 bytes in the first message, the rest in the second.
    for number, more, piece in [(0, True, long[:2048]), (2, False, long[2048:5000])]:
        message = aiocoap.Message(code=aiocoap.PUT, uri=f"{base}/s?t={token}", payload=piece, content_format=42)
        message.opt.block1 = aiocoap.optiontypes.BlockOption.BlockwiseTuple(number, more, 7)
        answer = await asyncio.wait_for(context.request(message, handle_blockwise=False).response, 10)
        assert answer.code == (aiocoap.CONTINUE if more else aiocoap.CHANGED), (answer.code, answer.payload)
        assert (answer.opt.block1.block_number, answer.opt.block1.size_exponent) == (number, 7), answer.opt
    answer = await request(context, aiocoap.GET, f"{base}/s?t={token}")
    assert answer.payload == long[:5000], len(answer.payload)
    await context.shutdown()
    print("ok")


asyncio.run(main())
