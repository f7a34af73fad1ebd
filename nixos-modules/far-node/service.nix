# The unit. far-node's microVMs outlive it: only its own process is stopped, and the next one adopts them.
{ config, lib, pkgs, ... }:
let
  cfg = config.services.far-node;
  option = name: value: lib.optionals (value != null) [ "--${name}" (toString value) ];
  arguments =
    option "state-dir" "/var/lib/far/node"
    ++ option "run-dir" "/run/far"
    ++ option "boot-kit" cfg.bootKit
    ++ option "max-vms" cfg.maxVms
    ++ option "name" cfg.name
    ++ option "controller" cfg.controller
    ++ option "controller-ca" cfg.controllerCa
    ++ option "join-token-file" cfg.joinTokenFile
    ++ lib.optionals (cfg.controller != null) (option "listen" cfg.listen);
in
{
  config = lib.mkIf cfg.enable {
    systemd.services.far-node = {
      description = "Node agent: agents in microVMs";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];
      # far-vmm runs one of them per microVM.
      path = [ cfg.package pkgs.qemu_kvm ];
      serviceConfig = {
        ExecStart = lib.escapeShellArgs ([ "${cfg.package}/bin/far-node" ] ++ arguments);
        Restart = "always";
        RestartSec = "1s";
        # Invariant: a restart of the agent does not end a microVM.
        KillMode = "process";
        Delegate = true;
        StateDirectory = "far";
        StateDirectoryMode = "0700";
        RuntimeDirectory = "far";
        RuntimeDirectoryMode = "0700";
        # The sockets of running microVMs lie here.
        RuntimeDirectoryPreserve = "yes";
        LimitNOFILE = 65536;
      };
    };
  };
}
