// Streams an answer over gRPC, then asks for something that is refused, and reads the details of the refusal.
//
//	go run . [localhost:50051]        FLAN_KEY=... where the server has keys
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	flanv1 "example.com/flan/gen/flan/v1"
)

func main() {
	target := "localhost:50051"
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := flanv1.NewFlanServiceClient(connection)

	// The deadline is the request's: the server stops working on it, too.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if key := os.Getenv("FLAN_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	if err := stream(ctx, client); err != nil {
		log.Fatal(err)
	}
	refused(ctx, client)
}

func stream(ctx context.Context, client flanv1.FlanServiceClient) error {
	events, err := client.GenerateStream(ctx, &flanv1.GenerateRequest{
		Mode:        flanv1.Mode_MODE_COT.Enum(),
		Instruction: proto.String("Take the last letters of Paul Maria and join them."),
	})
	if err != nil {
		return err
	}
	for {
		event, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if delta := event.GetDelta(); delta != nil {
			fmt.Print(delta.GetText())
		}
		if final := event.GetFinal(); final != nil {
			fmt.Printf("\nanswer: %s, tokens: %d\n", final.GetAnswer(), final.GetUsage().GetTotalTokens())
		}
	}
}

func refused(ctx context.Context, client flanv1.FlanServiceClient) {
	_, err := client.Generate(ctx, &flanv1.GenerateRequest{
		Instruction: proto.String("Name a colour."),
		Temperature: proto.Float64(3),
	})
	refusal := status.Convert(err)
	fmt.Printf("%s: %s\n", refusal.Code(), refusal.Message())
	for _, detail := range refusal.Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok {
			fmt.Printf("field: %s\n", bad.GetFieldViolations()[0].GetField())
		}
	}
}
