# Settings that cannot work fail when the system is evaluated, with a sentence.
{ config, lib, ... }:
let
  cfg = config.services.far-node;
in
{
  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = (cfg.controller == null) == (cfg.controllerCa == null);
        message = "services.far-node: controller and controllerCa belong together: set both, or neither for a blade of its own.";
      }
      {
        assertion = cfg.controller == null || lib.hasPrefix "https://" cfg.controller;
        message = "services.far-node.controller must start with https://: the blade API is mTLS only.";
      }
      {
        assertion = cfg.joinTokenFile == null || cfg.controller != null;
        message = "services.far-node.joinTokenFile is for joining a controller: set services.far-node.controller as well.";
      }
      {
        assertion = cfg.joinTokenFile == null || !(lib.hasPrefix builtins.storeDir cfg.joinTokenFile);
        message = "services.far-node.joinTokenFile lies in the Nix store, where everybody can read it: name a file outside.";
      }
      {
        assertion = cfg.name == null || builtins.match "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?" cfg.name != null;
        message = "services.far-node.name must be a DNS-1123 label: lower-case letters, digits and -, at most 63 characters.";
      }
    ];
  };
}
