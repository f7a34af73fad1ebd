package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A start that takes longer is not going to work.
const readyWithin = 2 * time.Minute

// plane is one control plane: its folder, ports, and the programs that run.
type plane struct {
	dir, self, token string
	ended            chan string
	children         []*exec.Cmd
}

// up starts a control plane in --dir, writes its kubeconfig there, prints that file's path, and serves until a signal or,
// with --tied, until standard input ends: a test program that is killed cannot leave it behind.
func up(arguments []string) error {
	// The kernel ends the children when the thread that started them ends: that has to be this one, which never does.
	runtime.LockOSThread()
	flags := flag.NewFlagSet("up", flag.ExitOnError)
	dir := flags.String("dir", "", "folder for its data, made when missing; a used one goes on with its data")
	with := flags.String("with", "", "further parts, comma-separated: controller-manager, scheduler, audit-log (in --dir)")
	tied := flags.Bool("tied", false, "end when standard input ends")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	if *dir == "" {
		return errors.New("--dir is needed")
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	if *tied {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			asked <- syscall.SIGTERM
		}()
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	p := &plane{dir: *dir, self: self, ended: make(chan string, 4)}
	defer p.end()
	if err := p.prepare(); err != nil {
		return err
	}
	parts := strings.Split(*with, ",")
	kubeconfig, err := p.serve(asked, slices.Contains(parts, "audit-log"))
	if err != nil {
		return err
	}
	for _, program := range parts {
		switch program {
		case "", "audit-log":
		case "controller-manager":
			err = p.start(program, "--kubeconfig="+kubeconfig, "--secure-port=0", "--leader-elect=false",
				"--use-service-account-credentials=false", "--service-account-private-key-file="+p.file("sa.key"),
				"--kube-api-qps=1000", "--kube-api-burst=2000",
				"--controllers=garbage-collector-controller,namespace-controller,serviceaccount-controller,"+
					"deployment-controller,replicaset-controller")
		case "scheduler":
			err = p.start(program, "--kubeconfig="+kubeconfig, "--secure-port=0", "--leader-elect=false",
				"--kube-api-qps=5000", "--kube-api-burst=10000")
		default:
			err = fmt.Errorf("--with: %q is none of controller-manager, scheduler and audit-log", program)
		}
		if err != nil {
			return err
		}
	}
	fmt.Println(kubeconfig)
	select {
	case <-asked:
		return nil
	case who := <-p.ended:
		return fmt.Errorf("%s ended by itself: see %s", who, p.file(who+".log"))
	}
}

func (p *plane) file(name string) string { return filepath.Join(p.dir, name) }

// prepare makes the folder, the administrator's token and the key of service accounts' tokens, all once.
func (p *plane) prepare() error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	if text, err := os.ReadFile(p.file("tokens.csv")); err == nil {
		p.token, _, _ = strings.Cut(string(text), ",")
		return nil
	}
	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // Never fails.
	p.token = hex.EncodeToString(secret)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	keyPem := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	if err := os.WriteFile(p.file("sa.key"), keyPem, 0o600); err != nil {
		return err
	}
	return os.WriteFile(p.file("tokens.csv"), []byte(p.token+",admin,admin,system:masters\n"), 0o600)
}

// start runs one of this binary's programs with its output in a log.
func (p *plane) start(program string, arguments ...string) error {
	log, err := os.Create(p.file(program + ".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	child := exec.Command(p.self, append([]string{program}, arguments...)...)
	child.Stdout, child.Stderr = log, log
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := child.Start(); err != nil {
		return err
	}
	p.children = append(p.children, child)
	go func() {
		_ = child.Wait()
		p.ended <- program
	}()
	return nil
}

// serve starts etcd and the API server on free ports, and waits until it is ready.
func (p *plane) serve(asked <-chan os.Signal, audited bool) (string, error) {
	ports, err := freePorts(3)
	if err != nil {
		return "", err
	}
	client, peer := "http://127.0.0.1:"+ports[0], "http://127.0.0.1:"+ports[1]
	// Nothing here outlives a crash of the machine.
	err = p.start("etcd", "--data-dir="+p.file("etcd"), "--unsafe-no-fsync", "--listen-client-urls="+client,
		"--advertise-client-urls="+client, "--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer,
		"--initial-cluster=default="+peer, "--log-level=warn", "--quota-backend-bytes=8589934592")
	if err != nil {
		return "", err
	}
	var audit []string
	if audited {
		policy := "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n- level: Metadata\n"
		if err := os.WriteFile(p.file("audit-policy.yaml"), []byte(policy), 0o600); err != nil {
			return "", err
		}
		audit = []string{"--audit-policy-file=" + p.file("audit-policy.yaml"), "--audit-log-path=" + p.file("audit.log")}
	}
	err = p.start("apiserver", append(audit, "--etcd-servers="+client, "--secure-port="+ports[2], "--bind-address=127.0.0.1",
		"--cert-dir="+p.file("certs"), "--authorization-mode=RBAC", "--token-auth-file="+p.file("tokens.csv"),
		"--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+p.file("sa.key"),
		"--service-account-signing-key-file="+p.file("sa.key"), "--shutdown-delay-duration=0")...)
	if err != nil {
		return "", err
	}
	address := "https://127.0.0.1:" + ports[2]
	deadline := time.After(readyWithin)
	for {
		if ca := p.isReady(address); ca != nil {
			kubeconfig := p.file("kubeconfig")
			return kubeconfig, os.WriteFile(kubeconfig, kubeconfigOf(address, p.token, ca), 0o600)
		}
		select {
		case <-time.After(25 * time.Millisecond):
		case who := <-p.ended:
			return "", fmt.Errorf("%s did not start: see %s", who, p.file(who+".log"))
		case <-asked:
			return "", errors.New("told to end before it was ready")
		case <-deadline:
			return "", fmt.Errorf("not ready after %s: see %s", readyWithin, p.file("apiserver.log"))
		}
	}
}

// isReady answers the certificate authority that the API server made for itself, once it is ready.
func (p *plane) isReady(address string) []byte {
	chain, err := os.ReadFile(p.file("certs/apiserver.crt"))
	if err != nil {
		return nil
	}
	ca := chain[max(bytes.LastIndex(chain, []byte("-----BEGIN")), 0):]
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	within, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(within, http.MethodGet, address+"/readyz", nil)
	if err != nil {
		return nil
	}
	request.Header.Set("Authorization", "Bearer "+p.token)
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return nil
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil
	}
	return ca
}

func kubeconfigOf(address, token string, ca []byte) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: servers
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: admin
  user:
    token: %s
contexts:
- name: servers
  context:
    cluster: servers
    user: admin
current-context: servers
`, address, base64.StdEncoding.EncodeToString(ca), token)
}

// freePorts asks the kernel for ports of loopback that nobody has.
func freePorts(count int) ([]string, error) {
	var ports []string
	for range count {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		// Held until all are found, so that they differ.
		defer listener.Close()
		_, port, _ := net.SplitHostPort(listener.Addr().String())
		ports = append(ports, port)
	}
	return ports, nil
}

// end kills what was started, the last first. On TERM the API server drains for longer than anybody here waits.
func (p *plane) end() {
	for _, child := range slices.Backward(p.children) {
		_ = child.Process.Kill()
	}
}
