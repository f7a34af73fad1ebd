// A Kubernetes control plane for tests: the real programs of pinned modules in one binary. The first argument says which;
// under the name kubectl it is that one.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

// run ends the process with the program's code.
func run(command *cobra.Command) { os.Exit(cli.Run(command)) }

func main() {
	program := ""
	if filepath.Base(os.Args[0]) == "kubectl" {
		program = "kubectl"
	} else if len(os.Args) > 1 {
		program = os.Args[1]
		// Each program reads os.Args itself, and must not see our word.
		os.Args = append(os.Args[:1], os.Args[2:]...)
	}
	switch program {
	case "apiserver":
		run(apiserver.NewAPIServerCommand())
	case "controller-manager":
		run(manager.NewControllerManagerCommand())
	case "scheduler":
		run(scheduler.NewSchedulerCommand())
	case "etcd":
		etcdmain.Main(os.Args)
	case "up":
		if err := up(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "kubectl":
		if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
			util.CheckErr(err)
		}
	default:
		fmt.Fprintln(os.Stderr, "usage: kube up|apiserver|controller-manager|scheduler|etcd|kubectl [FLAG…]")
		os.Exit(2)
	}
}
