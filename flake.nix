# What is true today: this file parses, and its outputs have the names below when nixpkgs is a stub. nixpkgs itself was never
# evaluated with it and no output was built, so there is no flake.lock yet: a machine with network makes it (`nix flake lock`).
# The build that is proven is `make build` and `make guest`.
{
  description = "Tinkerbell FAR: autonomous agents in microVMs, as Kubernetes resources";

  # The workspace needs Rust 1.90, which stable channels of that age do not have.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      system = "x86_64-linux"; # guests, kernel and images are for this one so far
      pkgs = nixpkgs.legacyPackages.${system};
      common = {
        version = "0.1.0";
        src = self;
        # No hash to keep: every dependency comes from the crate registry.
        cargoLock.lockFile = ./Cargo.lock;
        # The tests need QEMU, vsock and namespaces: `make test` runs them.
        doCheck = false;
      };
    in
    {
      packages.${system} = {
        # Everything that runs outside the microVM.
        far = pkgs.rustPlatform.buildRustPackage (common // {
          pname = "far";
          cargoBuildFlags = [ "-p" "far-cli" "-p" "far-controller" "-p" "far-devapi" "-p" "far-node" "-p" "far-vmm" "-p" "far-image" ];
        });
        # What runs inside: static. Here that means musl; `make guest` links glibc statically, which is what was tested.
        guest = pkgs.pkgsStatic.rustPlatform.buildRustPackage (common // {
          pname = "far-guest";
          buildType = "guest"; # the Cargo profile
          cargoBuildFlags = [ "-p" "far-init" "-p" "tiffany" ];
        });
        default = self.packages.${system}.far;
      };

      nixosModules.far-node = { imports = [ ./nixos-modules/far-node ]; };
    };
}
