"""The HTTP service on all hosts of a Ray cluster: python examples/ray_serve.py runs/digits 2

Ray starts the replicas, shares requests among them and starts again those that die. Needs pip install 'ray[serve]'.
"""

import os
import sys

import ray
from ray import serve


def start(model_path, replicas, port=8000):
    """Start so many replicas of the service, one GPU each where there are GPUs; returns the handle of Ray Serve."""
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    def build():
        """The application of one replica, with an engine of its own."""
        from improved_diffusion.config.service import EngineConfig, ServeConfig
        from improved_diffusion.service.catalogue import Catalogue
        from improved_diffusion.service.engine import Engine
        from improved_diffusion.service.http.app import PUBLIC, create_app
        from improved_diffusion.service.http.security import access_for

        engine = Engine(Catalogue(model_paths=[model_path]), EngineConfig())
        engine.start()
        options = ServeConfig(model_path=model_path)
        app, _ = create_app(engine, options, access_for(options, public=PUBLIC))
        return app

    @serve.deployment(num_replicas=replicas, max_ongoing_requests=256, ray_actor_options={"num_gpus": gpus})
    @serve.ingress(build)
    class Service:
        pass

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return serve.run(Service.bind(), name="improved_diffusion", route_prefix="/")


if __name__ == "__main__":
    ray.init()
    start(os.path.abspath(sys.argv[1]), int(sys.argv[2]))
    input("the service is at http://127.0.0.1:8000; press Enter to stop it\n")
