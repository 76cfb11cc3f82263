// Package registrationv1 is how a CSI driver makes itself known to kubelet.
package registrationv1
