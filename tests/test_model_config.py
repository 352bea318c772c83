"""config.model names every network; a config that does not describe one is refused."""

import dataclasses
import json

import pytest

from diffdistill import chain
from diffdistill.config import ConfigError, default_config, resolve, smoke, to_dict
from diffdistill.models import song_unet
from diffdistill.models.edm_adm import EdmADM
from diffdistill.models.song_unet import SongUNet
from diffdistill.models.unet import UNet

FACTS = chain.DataFacts((16, 16, 3), 4)


def settings(**model):
    config = smoke(default_config())
    config.teacher.num_updates = 2
    config.model.update(model)
    return config


def network_of(**model):
    config = resolve(settings(**model))
    return chain.denoiser_of(config, chain.plan(config)[0], FACTS, dropout=0.2).network


def test_every_architecture_comes_from_a_config():
    kinds = {name: type(network_of(architecture=name)) for name in ("unet", "ddpmpp", "ncsnpp", "edm_adm")}
    assert kinds == {"unet": UNet, "ddpmpp": SongUNet, "ncsnpp": SongUNet, "edm_adm": EdmADM}
    network = network_of(architecture="ncsnpp", augmentation_features=9, decoder="skip", num_heads=2)
    assert (network.encoder, network.decoder, network.noise_embedding) == ("residual", "skip", "fourier")
    assert (network.augmentation_features, network.dropout, network.num_classes, network.num_heads) == (9, 0.2, 4, 2)


def test_frequencies_survive_the_config_on_disk():
    frequencies = song_unet.fourier_frequencies(8)
    config = resolve(settings(architecture="ncsnpp", noise_frequencies=frequencies))
    again = resolve(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert again.model.noise_frequencies == frequencies


def test_groups_are_free_where_the_network_chooses_them():
    assert network_of(architecture="ddpmpp", channels=12, num_groups=32).num_groups == 32
    with pytest.raises(ConfigError, match="cannot be split into"):
        resolve(settings(architecture="unet", channels=12, num_groups=32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "ddpm"}, "Did you mean 'ddpmpp'"),
        ({"encoder": "skip"}, "encoder='skip' is no setting of architecture 'unet'"),
        ({"architecture": "ncsnpp", "encoder": "twice"}, "config.model.encoder is 'twice'"),
        ({"architecture": "ncsnpp", "decoder": "residual"}, "config.model.decoder is 'residual'"),
        ({"architecture": "ncsnpp", "noise_frequencies": (1.0, 2.0)}, "has 2 entries"),
        ({"architecture": "ddpmpp", "noise_frequencies": (1.0,) * 8}, "no setting of architecture 'ddpmpp'"),
        ({"architecture": "ddpmpp", "augmentation_features": -1}, "must be at least 0"),
    ],
)
def test_what_no_network_has_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        resolve(settings(**model))


def test_an_architecture_is_built_from_every_field_it_shares_with_the_config():
    fields = {field.name for field in dataclasses.fields(chain.ModelConfig)}
    network = network_of(architecture="ncsnpp")
    own = {field.name for field in dataclasses.fields(network)} - {"parent", "name"}
    chosen_elsewhere = {"output_channels", "num_classes", "guidance_embedding", "dropout"}
    fixed_by_the_name = {"noise_embedding", "resample_filter"}
    assert own - fields == chosen_elsewhere | fixed_by_the_name
