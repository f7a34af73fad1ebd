# What a blade can be told. `null` always means: the node agent's own default, which the option's text names.
{ lib, ... }:
let
  inherit (lib) mkEnableOption mkOption types;
in
{
  options.services.far-node = {
    enable = mkEnableOption "the node agent, which runs agents in microVMs";

    package = mkOption {
      type = types.package;
      description = "Package with far-node and far-vmm, for example packages.x86_64-linux.far of this flake.";
    };

    bootKit = mkOption {
      type = types.path;
      example = "/var/lib/far/guest";
      description = "Folder with vmlinux and initramfs.cpio, as `far-image kit` makes it.";
    };

    name = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "blade-07";
      description = "Name of the blade, a DNS-1123 label. null: the machine's host name, cleaned.";
    };

    listen = mkOption {
      type = types.str;
      default = "127.0.0.1:0";
      example = "10.0.0.7:7443";
      description = "Address and port of the node API for the controller. Port 0: the kernel picks.";
    };

    controller = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "https://controller.example:7444";
      description = "Blade API of far-controller. null: the blade stands alone and serves its Unix socket only.";
    };

    controllerCa = mkOption {
      type = types.nullOr types.path;
      default = null;
      description = "PEM of the CA that the controller's certificate must come from. null: only with controller = null.";
    };

    joinTokenFile = mkOption {
      # A string, not a path: a path literal would copy the secret into the world-readable store.
      type = types.nullOr types.str;
      default = null;
      example = "/run/secrets/far-join-token";
      description = "File with the one-use join token; the agent removes it after joining. null: the blade has joined already.";
    };

    maxVms = mkOption {
      type = types.ints.positive;
      default = 250;
      description = "Most microVMs at a time.";
    };
  };
}
