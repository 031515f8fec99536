"""A CoAP device that serves resources and registers them (RFC 9176): aiocoap, no code of Tidegate's.

coap_lamp.py PORT DEVICE TOKEN        registers over UDP, prints `registered LOCATION`, serves until its standard input ends
"""

import asyncio
import sys

import aiocoap
from aiocoap import resource

TAG = b"\x01\x02"


class Lamp(resource.ObservableResource):
    """A value that can be read, written and observed."""

    def __init__(self, value, content_format, observable, rt):
        super().__init__()
        self.value, self.content_format, self.observable, self.rt = value, content_format, observable, rt

    def get_link_description(self):
        links = {"rt": self.rt, "ct": str(self.content_format)}
        return {**links, "obs": None} if self.observable else links

    async def add_observation(self, request, serverobservation):
        if self.observable:
            await super().add_observation(request, serverobservation)

    async def render_get(self, request):
        if TAG in request.opt.etags:
            return aiocoap.Message(code=aiocoap.VALID, etag=TAG)
        return aiocoap.Message(payload=self.value, content_format=self.content_format, etag=TAG)

    async def render_put(self, request):
        self.value = request.payload
        self.content_format = request.opt.content_format or 0
        if self.observable:
            self.updated_state()
        return aiocoap.Message(code=aiocoap.CHANGED)


class Silent(resource.Resource):
    """Acknowledges and never answers."""

    async def render_get(self, request):
        await asyncio.sleep(3600)


async def main():
    port, device, token = sys.argv[1:4]
    site = resource.Site()
    site.add_resource([".well-known", "core"], resource.WKCResource(site.get_resources_as_linkheader))
    site.add_resource(["sensors", "temp"], Lamp(b"21.5", 0, True, "temperature"))
    site.add_resource(["lamp"], Lamp(b'{"on":false}', 50, False, "lamp"))
    site.add_resource(["long"], Lamp(b"long " * 1000, 0, False, "text"))
    # What never answers is not registered: reading it would keep the others waiting.
    silent = Silent()
    silent.get_link_description = lambda: None
    site.add_resource(["silent"], silent)
    context = await aiocoap.Context.create_server_context(site, bind=("127.0.0.1", 0))
    links = str(site.get_resources_as_linkheader()).encode()
    uri = f"coap://127.0.0.1:{port}/rd?ep={device}&lt=120&et=lamp&t={token}"
    request = aiocoap.Message(code=aiocoap.POST, uri=uri, payload=links, content_format=40)
    answer = await asyncio.wait_for(context.request(request).response, 10)
    assert answer.code == aiocoap.CREATED, (answer.code, answer.payload, links)
    print("registered", "/".join(answer.opt.location_path), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await context.shutdown()


asyncio.run(main())
