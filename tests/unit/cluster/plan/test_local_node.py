from cluster.config import Config
from cluster.plan.local_node import node_labels, node_resources


def config(**sections: object) -> Config:
    return Config.model_validate({"model": {"path": "/m"}, **sections})


def test_every_process_fits() -> None:
    # Serve 2, gateway 1, attention 2, workers 2 x 1.
    assert node_resources(config()) == {"CPU": 7}
    # Workers ask for their threads.
    assert node_resources(config(experts={"workers": 3, "threads": 4})) == {"CPU": 17}


def test_what_is_set_wins() -> None:
    assert node_resources(config(ray={"num_cpus": 3})) == {"CPU": 3}


def test_custom_resources_and_labels_are_offered() -> None:
    asked = config(
        attention={"placement": {"labels": {"role": "x"}}},
        experts={"workers": 2, "placement": {"resources": {"host": 1}, "labels": {"role": "x", "zone": "a"}}},
    )
    assert node_resources(asked)["host"] == 4
    assert node_labels(asked) == {"role": "x", "zone": "a"}
